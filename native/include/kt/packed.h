// One weight of all experts in panels (kt/layout.h), and how it gets there.
#pragma once
#include <kt/buffer.h>
#include <kt/layout.h>

#include <cstddef>
#include <cstdint>

namespace kt {

// Element (expert, n, k) of a weight: n is the output feature, k the input feature. Strides in elements.
struct weight_view {
  void* data = nullptr;
  dtype type = dtype::f32;
  std::ptrdiff_t stride_expert = 0, stride_n = 0, stride_k = 0;
};

// Throws std::invalid_argument unless the kernels have this format: of another they would ignore a part, or read what
// is not there.
void check_format(const weight_format& format);

// A quantised weight, a byte for each code. Scale (and zero point) g of (expert, n) is that of the k of group g.
// mxfp4's scales are powers of two.
struct quantized_view {
  const std::uint8_t* codes = nullptr;
  std::ptrdiff_t stride_expert = 0, stride_n = 0, stride_k = 0;
  const float* scales = nullptr;
  const std::uint8_t* zeros = nullptr;  // null: none
  std::ptrdiff_t scale_stride_expert = 0, scale_stride_n = 0, scale_stride_group = 0;
};

// Element (expert, n) of a bias.
struct bias_view {
  const void* data = nullptr;  // null: no bias
  dtype type = dtype::f32;
  std::ptrdiff_t stride_expert = 0, stride_n = 0;
};

// Which output feature a column of a panel holds.
class column_map {
 public:
  // Column i is feature begin + i.
  static column_map plain(std::size_t begin, std::size_t features) { return {begin, features, 0, false}; }
  // Panels of 16 gate and 16 up columns: gate column i is row begin + i of the weight, up column i is row
  // `up` + begin + i; interleaved: 2 (begin + i) and 2 (begin + i) + 1.
  static column_map gated(std::size_t begin, std::size_t features, std::size_t up, bool interleaved) {
    column_map m{begin, features, up, interleaved};
    m.gated_ = true;
    return m;
  }

  std::size_t per_panel() const { return gated_ ? panel_columns / 2 : panel_columns; }
  std::ptrdiff_t feature(std::size_t panel, int column) const {  // -1: padding
    const bool up = gated_ && column >= panel_columns / 2;
    const std::size_t i = panel * per_panel() + column - (up ? panel_columns / 2 : 0);
    if (i >= features_) return -1;
    return static_cast<std::ptrdiff_t>(interleaved_ ? 2 * (begin_ + i) + up : begin_ + i + (up ? up_ : 0));
  }

 private:
  column_map(std::size_t begin, std::size_t features, std::size_t up, bool interleaved)
      : begin_(begin), features_(features), up_(up), interleaved_(interleaved) {}
  std::size_t begin_, features_, up_;
  bool interleaved_, gated_ = false;
};

struct region {
  const void* data = nullptr;
  std::size_t bytes = 0;
};

class packed_weight {
 public:
  packed_weight(const weight_format& format, int num_experts, std::size_t panels, std::size_t k_begin, std::size_t k,
                const column_map& columns, int node);  // zeroed

  const panel_layout& layout() const { return layout_; }
  std::size_t panels() const { return panels_; }  // of one expert
  std::size_t k() const { return k_; }            // without padding
  std::size_t panel_bytes() const { return panel_bytes_; }
  const char* panel(std::size_t expert, std::size_t p) const {
    return data_.as<const char>((expert * panels_ + p) * panel_bytes_);
  }
  const float* panel_bias(std::size_t expert, std::size_t p) const {
    return bias_.bytes() ? bias_.as<const float>() + (expert * panels_ + p) * panel_columns : nullptr;
  }
  std::size_t bytes() const { return data_.bytes() + bias_.bytes(); }
  std::size_t expert_bytes() const { return panels_ * panel_bytes_; }  // without the bias

  // One expert at a time, so that the source of each can be freed as soon as it has been read. Of a format of floats,
  // and of the others, which throws std::invalid_argument for codes, scales and zero points that the kernels cannot
  // multiply.
  void pack(int expert, const weight_view& source);
  void pack(int expert, const quantized_view& source);
  void pack_bias(const bias_view& source);
  // Writes the weights of one expert, dequantised, to where `pack` would read them from.
  void unpack(int expert, const weight_view& target) const;

  // Reads from memory of another from now on, laid out as this weight's; `bias`: null where there is none. What would
  // write to it throws std::logic_error.
  void map(const void* data, const void* bias);
  bool mapped() const { return !data_.owned(); }
  // Of all experts together, without what was rounded up; `bias_memory`: nothing where there is none.
  region memory() const { return {data_.as<>(), num_experts_ * expert_bytes()}; }
  region bias_memory() const { return {bias_.as<>(), num_experts_ * bias_bytes()}; }

  // Takes over an expert, its bias too, from a weight of the same format and shape, but for the number of experts.
  void copy(int expert, const packed_weight& from, int from_expert);
  void fill(int expert, unsigned char byte);
  // An expert as its bytes: its panels, and its bias (fp32 [panel][32]) if there is one, to and from other memory.
  std::size_t bias_bytes() const { return bias_.bytes() ? panels_ * panel_columns * sizeof(float) : 0; }
  char* read(int expert, char* to) const;           // returns the end of what it wrote
  const char* write(int expert, const char* from);  // what `read` wrote, but that the bias stays as it is
  // Gives the memory of an expert's weights back until it is packed or copied to again. The bias stays.
  void release(int expert) const { data_.discard(expert * expert_bytes(), expert_bytes()); }

 private:
  template <class F>
  void for_columns(int expert, F f) const;
  void check_owned() const;

  panel_layout layout_;
  int num_experts_;
  std::size_t panels_, k_begin_, k_;  // k [k_begin, k_begin + k) of the source
  column_map columns_;
  std::size_t panel_bytes_;
  buffer data_;
  buffer bias_;  // fp32 [expert][panel][32]; empty: none
};

}  // namespace kt
