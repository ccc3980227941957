// Weight formats and how they lie in packed memory.
//
// Columns (output features) in panels of 32. A panel is a sequence of groups of the reduction dimension K; a group is
// its codes, then a scale (and a zero point) for each column. Codes, for columns c and k inside of a group:
//   f32, f16   [K][32]
//   bf16       [K/2][32][2]: a 32-bit lane holds an even and an odd k
//   int8, fp8 (e4m3)  [K/2][4][2][4][2]: columns 4 i + {0, 16}, column, parity of k
//   int8_dyn   [K/4][32][4]
//   int4, int4_dyn, mxfp4  [K/4][32] words of 16 bits; word 2 (c % 16) + k % 2 holds four codes, the lowest first:
//                (c / 16, k / 2 % 2) = (0, 0), (1, 0), (0, 1), (1, 1)
// Beyond the last k activations are zero, whatever the codes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kt {

enum class dtype : std::uint8_t { f32, f16, bf16 };
constexpr int num_dtypes = 3;
constexpr std::size_t size_of(dtype t) { return t == dtype::f32 ? 4 : 2; }

enum class format : std::uint8_t { f32, f16, bf16, int8, int8_dyn, int4, fp8, mxfp4, int4_dyn };
constexpr int num_formats = 9;

enum class scale_type : std::uint8_t { none, f32, f16, bf16, e8m0 };

constexpr int panel_columns = 32;
// Goes up with whatever changes the bytes of packed weights: here, in the columns of a panel or in the slices of an
// expert. Weights that were packed to a file by another version are not read.
constexpr int layout_version = 1;

struct weight_format {
  format kind = format::bf16;
  int group = 0;  // k that share a scale; 0: all of K
  scale_type scale = scale_type::none;
  bool zero_points = false;  // int4, int4_dyn: a code q is q - zero, one byte each; else q - 8
};

constexpr bool is_float(format f) { return f == format::f32 || f == format::f16 || f == format::bf16; }
// Whether rows are quantised to int8 too, so that products are of integers.
constexpr bool is_dynamic(format f) { return f == format::int8_dyn || f == format::int4_dyn; }
// Whether the weights that a kernel multiplies are bf16 numbers.
constexpr bool in_bf16(format f) { return f != format::f32 && f != format::f16 && !is_dynamic(f); }

// Inlined without fail: a copy that one instruction set compiled must not serve another.
struct panel_layout {
  weight_format format;
  std::size_t k = 0;      // padded
  std::size_t group = 0;  // k of a group; the last one may be shorter

  panel_layout() = default;
  panel_layout(const weight_format& f, std::size_t features)
      : format(f), k(padded(f.kind, features)), group(f.group ? f.group : k) {}

  // AMX takes K in steps of 64 bytes of activations.
  [[gnu::always_inline]] static constexpr std::size_t padded(kt::format f, std::size_t k) {
    const std::size_t step = f == kt::format::int8_dyn ? 64 : 32;
    return (k + step - 1) / step * step;
  }
  [[gnu::always_inline]] std::size_t code_bytes(std::size_t count) const {
    switch (format.kind) {
      case kt::format::f32: return count * panel_columns * 4;
      case kt::format::f16:
      case kt::format::bf16: return count * panel_columns * 2;
      case kt::format::int4:
      case kt::format::int4_dyn:
      case kt::format::mxfp4: return count * panel_columns / 2;
      default: return count * panel_columns;
    }
  }
  [[gnu::always_inline]] std::size_t scale_bytes() const {  // of one group, with its zero points or column sums
    constexpr std::size_t sizes[] = {0, 4, 2, 2, 1};
    const std::size_t extra = format.kind == kt::format::int8_dyn ? 4 : format.zero_points ? 1 : 0;
    return panel_columns * (sizes[static_cast<int>(format.scale)] + extra);
  }
  [[gnu::always_inline]] std::size_t groups() const { return (k + group - 1) / group; }
  // Where the codes of k begin.
  [[gnu::always_inline]] std::size_t code_offset(std::size_t at) const {
    return code_bytes(at) + at / group * scale_bytes();
  }
  [[gnu::always_inline]] std::size_t group_size(std::size_t g) const {
    return g + 1 < groups() ? group : k - g * group;
  }
  // Where the scales of group g begin; its zero points or column sums (int32, times 128) follow.
  [[gnu::always_inline]] std::size_t scale_offset(std::size_t g) const {
    return code_bytes(g * group + group_size(g)) + g * scale_bytes();
  }
  // Words of 32 bits that a quantised row has beside its codes.
  [[gnu::always_inline]] std::size_t row_scales() const {
    return format.kind == kt::format::int4_dyn ? groups() + k / 32 : 1;
  }
  [[gnu::always_inline]] std::size_t bytes() const { return code_bytes(k) + groups() * scale_bytes(); }
};

}  // namespace kt
