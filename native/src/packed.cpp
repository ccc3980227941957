#include <kt/packed.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace kt {
namespace {
#include "../kernels/float_bits.inl"

std::uint16_t f32_to_bf16(float x) {
  const std::uint32_t u = as_u32(x);
  if (x != x) return static_cast<std::uint16_t>(u >> 16 | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

float bf16_to_f32(std::uint16_t h) { return as_f32(static_cast<std::uint32_t>(h) << 16); }

template <dtype T>
struct element {  // fp32
  using storage = float;
  static float get(storage x) { return x; }
  static storage put(float x) { return x; }
};
template <>
struct element<dtype::f16> {
  using storage = std::uint16_t;
  static float get(storage x) { return f16_to_f32(x); }
  static storage put(float x) { return f32_to_f16(x); }
};
template <>
struct element<dtype::bf16> {
  using storage = std::uint16_t;
  static float get(storage x) { return bf16_to_f32(x); }
  static storage put(float x) { return f32_to_bf16(x); }
};

template <dtype From, dtype To>
typename element<To>::storage convert(typename element<From>::storage x) {
  if constexpr (From == To)
    return x;
  else
    return element<To>::put(element<From>::get(x));
}

// Calls f with the dtype as a compile-time constant.
template <class F>
auto with_dtype(dtype t, F f) {
  switch (t) {
    case dtype::f32: return f(std::integral_constant<dtype, dtype::f32>{});
    case dtype::f16: return f(std::integral_constant<dtype, dtype::f16>{});
    default: return f(std::integral_constant<dtype, dtype::bf16>{});
  }
}

dtype dtype_of(format f) { return f == format::f32 ? dtype::f32 : f == format::f16 ? dtype::f16 : dtype::bf16; }

// Place of (k, column) among a panel's floats.
template <dtype T>
std::size_t place(std::size_t k, int column) {
  if constexpr (T == dtype::bf16)
    return (k / 2 * panel_columns + column) * 2 + k % 2;
  else
    return k * panel_columns + column;
}

// Byte and shift of the code of (k, column) among the codes of a group.
struct code_place {
  std::size_t byte;
  int shift;
};

template <format F>
code_place place_of(std::size_t k, std::size_t column) {
  if constexpr (F == format::int8_dyn) {
    return {(k / 4 * panel_columns + column) * 4 + k % 4, 0};
  } else if constexpr (F == format::int8 || F == format::fp8) {
    return {k / 2 * 64 + column % 16 / 4 * 16 + column / 16 * 8 + column % 4 * 2 + k % 2, 0};
  } else {
    const std::size_t word = k / 4 * panel_columns + column % 16 * 2 + k % 2, code = k / 2 % 2 * 2 + column / 16;
    return {word * 2 + code / 2, static_cast<int>(code % 2 * 4)};
  }
}

template <format F>
void put_code(char* codes, std::size_t k, std::size_t column, std::uint8_t code) {
  const code_place to = place_of<F>(k, column);
  if constexpr (F == format::int4 || F == format::mxfp4)
    codes[to.byte] = static_cast<char>((codes[to.byte] & ~(15 << to.shift)) | (code & 15) << to.shift);
  else
    codes[to.byte] = static_cast<char>(code);
}

template <format F>
unsigned get_code(const char* codes, std::size_t k, std::size_t column) {
  const code_place from = place_of<F>(k, column);
  const unsigned byte = static_cast<unsigned char>(codes[from.byte]);
  return F == format::int4 || F == format::mxfp4 ? byte >> from.shift & 15u : byte;
}

// Calls f with a format of codes as a compile-time constant.
template <class F>
void with_codes(format kind, F f) {
  switch (kind) {
    case format::int8: return f(std::integral_constant<format, format::int8>{});
    case format::int8_dyn: return f(std::integral_constant<format, format::int8_dyn>{});
    case format::int4:
    case format::int4_dyn: return f(std::integral_constant<format, format::int4>{});  // the same codes
    case format::fp8: return f(std::integral_constant<format, format::fp8>{});
    default: return f(std::integral_constant<format, format::mxfp4>{});
  }
}

float code_value(const weight_format& f, unsigned code, int zero) {
  constexpr float e2m1[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  switch (f.kind) {
    case format::int4:
    case format::int4_dyn: return static_cast<float>(static_cast<int>(code) - zero);
    case format::fp8: return e4m3_to_f32(static_cast<int>(code));
    case format::mxfp4: return code & 8u ? -e2m1[code & 7u] : e2m1[code & 7u];
    default: return static_cast<float>(static_cast<std::int8_t>(code));
  }
}

void put_scale(scale_type type, char* scales, int column, float x) {
  const std::uint16_t half = type == scale_type::f16 ? f32_to_f16(x) : f32_to_bf16(x);
  switch (type) {
    case scale_type::f32: std::memcpy(scales + 4 * column, &x, 4); break;
    case scale_type::e8m0: scales[column] = static_cast<char>(as_u32(x) >> 23); break;
    default: std::memcpy(scales + 2 * column, &half, 2);
  }
}

float get_scale(scale_type type, const char* scales, int column) {
  switch (type) {
    case scale_type::f32: return load_as<float>(scales + 4 * column);
    case scale_type::f16: return f16_to_f32(load_as<std::uint16_t>(scales + 2 * column));
    case scale_type::bf16: return bf16_to_f32(load_as<std::uint16_t>(scales + 2 * column));
    default: return as_f32(static_cast<std::uint32_t>(static_cast<unsigned char>(scales[column])) << 23);
  }
}

std::string place_name(const char* what, int expert, std::ptrdiff_t n, const char* inner, std::size_t i) {
  return std::string("the ") + what + " of expert " + std::to_string(expert) + ", row " + std::to_string(n) + ", " +
         inner + " " + std::to_string(i) + " is ";
}

// Codes that all kernels take for the number that the format means: products of int8_dyn have no room for -128, and
// e4m3's NaN would be a number.
template <format F>
constexpr bool has_value(std::uint8_t code) {
  if constexpr (F == format::int4 || F == format::mxfp4)
    return code < 16;
  else
    return F == format::fp8 ? (code & 0x7f) != 0x7f : code != 0x80;
}

template <format F>
void check_codes(const std::uint8_t* codes, std::ptrdiff_t stride, std::size_t count, int expert, std::ptrdiff_t n,
                 std::size_t k) {
  bool bad = false;
  for (std::size_t i = 0; i < count; ++i) bad |= !has_value<F>(codes[static_cast<std::ptrdiff_t>(i) * stride]);
  if (!bad) return;
  while (has_value<F>(*codes)) codes += stride, ++k;
  constexpr bool is_signed = F == format::int8 || F == format::int8_dyn;
  const int value = is_signed ? static_cast<std::int8_t>(*codes) : *codes;
  throw std::invalid_argument(place_name("code", expert, n, "column", k) + std::to_string(value) + "; " +
                              (is_signed          ? "it must be from -127 to 127"
                               : F == format::fp8 ? "127 and 255 are NaN in e4m3"
                                                  : "it must be from 0 to 15"));
}

// Scales that the kernels multiply rightly: bf16 weights of mxfp4 must stay normal numbers.
void check_scale(const weight_format& f, float scale, int expert, std::ptrdiff_t n, std::size_t g) {
  const float size = std::fabs(scale);
  const bool power = (as_u32(scale) & 0x007fffffu) == 0 && scale > 0;
  const bool fits =
      std::isfinite(scale) && (f.kind != format::mxfp4 || (power && size >= 0x1p-120f && size <= 0x1p120f)) &&
      (f.scale != scale_type::f16 || size <= 65504.0f) && (f.scale != scale_type::bf16 || size < 0x1.ffp127f);
  if (fits) return;
  throw std::invalid_argument(place_name("scale", expert, n, "group", g) + std::to_string(scale) + "; " +
                              (f.kind == format::mxfp4 ? "mxfp4 needs a power of two from 2^-120 to 2^120"
                                                       : "it must be a number that the format can hold"));
}

void check_zero_point(std::uint8_t zero, int expert, std::ptrdiff_t n, std::size_t g) {
  if (zero < 16) return;
  throw std::invalid_argument(place_name("zero point", expert, n, "group", g) + std::to_string(zero) +
                              "; it must be from 0 to 15");
}

struct known_format {
  bool fits;
  const char* wanted;
};

known_format known(const weight_format& f) {
  const bool grouped = f.group == 32 || f.group == 64 || f.group == 128, whole = f.group == 0;
  const bool half = f.scale == scale_type::f16 || f.scale == scale_type::bf16, full = f.scale == scale_type::f32;
  switch (f.kind) {
    case format::int8:
      return {whole && (full || half) && !f.zero_points,
              "int8 has group 0, scales f32, f16 or bf16 and no zero points"};
    case format::int8_dyn:
      return {whole && full && !f.zero_points, "int8_dyn has group 0, scales f32 and no zero points"};
    case format::int4:
    case format::int4_dyn:
      return {grouped && half, "int4 and int4_dyn have group 32, 64 or 128, scales f16 or bf16, zero points or none"};
    case format::fp8:
      return {(whole || grouped) && (full || half) && !f.zero_points,
              "fp8 has group 0, 32, 64 or 128, scales f32, f16 or bf16 and no zero points"};
    case format::mxfp4:
      return {f.group == 32 && f.scale == scale_type::e8m0 && !f.zero_points,
              "mxfp4 has group 32, scales e8m0 and no zero points"};
    default:
      return {whole && f.scale == scale_type::none && !f.zero_points,
              "floats have group 0, scales none and no zero points"};
  }
}

}  // namespace

void check_format(const weight_format& f) {
  const known_format k = known(f);
  if (k.fits) return;
  constexpr const char* kinds[] = {"f32", "f16", "bf16", "int8", "int8_dyn", "int4", "fp8", "mxfp4", "int4_dyn"};
  constexpr const char* scales[] = {"none", "f32", "f16", "bf16", "e8m0"};
  throw std::invalid_argument(std::string("there is no ") + kinds[static_cast<int>(f.kind)] + " with group " +
                              std::to_string(f.group) + ", scales " + scales[static_cast<int>(f.scale)] + " and " +
                              (f.zero_points ? "" : "no ") + "zero points: " + k.wanted);
}

packed_weight::packed_weight(const weight_format& format, int num_experts, std::size_t panels, std::size_t k_begin,
                             std::size_t k, const column_map& columns, int node)
    : layout_(format, k),
      num_experts_(num_experts),
      panels_(panels),
      k_begin_(k_begin),
      k_(k),
      columns_(columns),
      panel_bytes_(layout_.bytes()),
      data_(num_experts * panels * panel_bytes_, node) {}

// Calls f(feature, panel data, column) for each column of an expert that is no padding.
template <class F>
void packed_weight::for_columns(int expert, F f) const {
  for (std::size_t p = 0; p < panels_; ++p)
    for (int column = 0; column < panel_columns; ++column)
      if (const std::ptrdiff_t n = columns_.feature(p, column); n >= 0)
        f(n, data_.as<char>((expert * panels_ + p) * panel_bytes_), column);
}

void packed_weight::check_owned() const {
  if (mapped()) throw std::logic_error("packed weights that are mapped from a file cannot be written to");
}

void packed_weight::map(const void* data, const void* bias) {
  const std::size_t bias_size = num_experts_ * panels_ * panel_columns * sizeof(float);
  data_ = buffer::view(data, num_experts_ * expert_bytes());
  bias_ = bias ? buffer::view(bias, bias_size) : buffer();
}

void packed_weight::pack(int expert, const weight_view& source) {
  check_owned();
  with_dtype(source.type, [&](auto from) {
    with_dtype(dtype_of(layout_.format.kind), [&](auto to) {
      constexpr dtype From = from(), To = to();
      using in_type = typename element<From>::storage;
      for_columns(expert, [&](std::ptrdiff_t n, char* panel, int column) {
        const auto* in = static_cast<const in_type*>(source.data) + expert * source.stride_expert +
                         n * source.stride_n + static_cast<std::ptrdiff_t>(k_begin_) * source.stride_k;
        auto* out = reinterpret_cast<typename element<To>::storage*>(panel);
        for (std::size_t i = 0; i < k_; ++i) out[place<To>(i, column)] = convert<From, To>(in[i * source.stride_k]);
      });
    });
  });
}

void packed_weight::pack(int expert, const quantized_view& source) {
  check_owned();
  const panel_layout& l = layout_;
  const std::size_t first_group = l.format.group ? k_begin_ / l.group : 0;
  for_columns(expert, [&](std::ptrdiff_t n, char* panel, int column) {
    const std::ptrdiff_t scales = expert * source.scale_stride_expert + n * source.scale_stride_n;
    for (std::size_t g = 0; g * l.group < k_; ++g) {
      const std::ptrdiff_t at = scales + static_cast<std::ptrdiff_t>(first_group + g) * source.scale_stride_group;
      char* scale = panel + l.scale_offset(g);
      check_scale(l.format, source.scales[at], expert, n, first_group + g);
      put_scale(l.format.scale, scale, column, source.scales[at]);
      if (!l.format.zero_points) continue;
      check_zero_point(source.zeros[at], expert, n, first_group + g);
      scale[2 * panel_columns + column] = static_cast<char>(source.zeros[at]);
    }
  });
  // A part of a panel that stays in the first-level cache while its columns are written, one after the other.
  constexpr std::size_t part = 128;
  const std::ptrdiff_t stride_k = source.stride_k;
  with_codes(l.format.kind, [&](auto kind) {
    for (std::size_t p = 0; p < panels_; ++p) {
      char* panel = data_.as<char>((expert * panels_ + p) * panel_bytes_);
      std::int32_t sums[panel_columns] = {};
      for (std::size_t k = 0, end; k < k_; k = end) {
        const std::size_t g = k / l.group * l.group;
        end = std::min({k + part, g + l.group, k_});
        char* codes = panel + l.code_offset(g);
        for (int column = 0; column < panel_columns; ++column) {
          const std::ptrdiff_t n = columns_.feature(p, column);
          if (n < 0) continue;
          const std::uint8_t* in = source.codes + expert * source.stride_expert + n * source.stride_n +
                                   static_cast<std::ptrdiff_t>(k_begin_ + k) * stride_k;
          check_codes<kind()>(in, stride_k, end - k, expert, n, k_begin_ + k);
          std::int32_t sum = 0;
          for (std::size_t i = k - g; i < end - g; ++i, in += stride_k) {
            put_code<kind()>(codes, i, column, *in);
            sum += static_cast<std::int8_t>(*in);
          }
          sums[column] += sum;
        }
      }
      if (kind() != format::int8_dyn) continue;
      for (std::int32_t& sum : sums) sum *= 128;
      std::memcpy(panel + l.scale_offset(0) + panel_columns * 4, sums, sizeof sums);
    }
  });
}

void packed_weight::unpack(int expert, const weight_view& target) const {
  const panel_layout& l = layout_;
  with_dtype(target.type, [&](auto to) {
    constexpr dtype To = to();
    using out_type = typename element<To>::storage;
    const auto row = [&](std::ptrdiff_t n) {
      return static_cast<out_type*>(target.data) + expert * target.stride_expert + n * target.stride_n +
             static_cast<std::ptrdiff_t>(k_begin_) * target.stride_k;
    };
    if (is_float(l.format.kind)) {
      with_dtype(dtype_of(l.format.kind), [&](auto from) {
        constexpr dtype From = from();
        for_columns(expert, [&](std::ptrdiff_t n, const char* panel, int column) {
          const auto* in = reinterpret_cast<const typename element<From>::storage*>(panel);
          out_type* out = row(n);
          for (std::size_t i = 0; i < k_; ++i) out[i * target.stride_k] = convert<From, To>(in[place<From>(i, column)]);
        });
      });
      return;
    }
    with_codes(l.format.kind, [&](auto kind) {
      for_columns(expert, [&](std::ptrdiff_t n, const char* panel, int column) {
        out_type* out = row(n);
        for (std::size_t g = 0; g * l.group < k_; ++g) {
          const char *codes = panel + l.code_offset(g * l.group), *scales = panel + l.scale_offset(g);
          const int zero = l.format.zero_points ? static_cast<unsigned char>(scales[2 * panel_columns + column]) : 8;
          const float scale = get_scale(l.format.scale, scales, column);
          const std::size_t count = std::min(l.group, k_ - g * l.group);
          for (std::size_t k = 0; k < count; ++k, out += target.stride_k)
            *out = element<To>::put(code_value(l.format, get_code<kind()>(codes, k, column), zero) * scale);
        }
      });
    });
  });
}

void packed_weight::pack_bias(const bias_view& source) {
  if (!source.data) return;
  check_owned();
  bias_ = buffer(num_experts_ * panels_ * panel_columns * sizeof(float));
  with_dtype(source.type, [&](auto from) {
    constexpr dtype From = from();
    const auto* in = static_cast<const typename element<From>::storage*>(source.data);
    for (int e = 0; e < num_experts_; ++e)
      for (std::size_t p = 0; p < panels_; ++p)
        for (int column = 0; column < panel_columns; ++column)
          if (const std::ptrdiff_t n = columns_.feature(p, column); n >= 0)
            bias_.as<float>()[(e * panels_ + p) * panel_columns + column] =
                element<From>::get(in[e * source.stride_expert + n * source.stride_n]);
  });
}

void packed_weight::copy(int expert, const packed_weight& from, int from_expert) {
  check_owned();
  std::memcpy(data_.as<char>(expert * expert_bytes()), from.data_.as<char>(from_expert * expert_bytes()),
              expert_bytes());
  if (!from.bias_.bytes()) return;
  const std::size_t size = panels_ * panel_columns * sizeof(float);
  bias_.reserve(num_experts_ * size);
  std::memcpy(bias_.as<char>(expert * size), from.bias_.as<char>(from_expert * size), size);
}

char* packed_weight::read(int expert, char* to) const {
  to = std::copy_n(data_.as<const char>(expert * expert_bytes()), expert_bytes(), to);
  return std::copy_n(bias_.as<const char>(expert * bias_bytes()), bias_bytes(), to);
}

const char* packed_weight::write(int expert, const char* from) {
  check_owned();
  std::memcpy(data_.as<char>(expert * expert_bytes()), from, expert_bytes());
  return from + expert_bytes() + bias_bytes();
}

void packed_weight::fill(int expert, unsigned char byte) {
  check_owned();
  std::memset(data_.as<char>(expert * expert_bytes()), byte, expert_bytes());
}

}  // namespace kt
