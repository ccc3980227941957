#include <kt/experts.h>

#include <cstring>
#include <type_traits>

namespace kt {
namespace {
#include "../kernels/float_bits.inl"

std::uint16_t f32_to_bf16(float x) {
  const std::uint32_t u = as_u32(x);
  if (x != x) return static_cast<std::uint16_t>(u >> 16 | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

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
  static float get(storage x) { return as_f32(static_cast<std::uint32_t>(x) << 16); }
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

// Place of (k, column) in a panel.
template <dtype T>
std::size_t place(std::size_t k, int column) {
  if constexpr (T == dtype::bf16)
    return (k / 2 * panel_columns + column) * 2 + k % 2;
  else
    return k * panel_columns + column;
}

// Which output feature a column of a panel holds; -1: padding.
class column_map {
 public:
  static column_map plain(std::size_t features) { return {features, false, false}; }
  static column_map gate_up(const experts_shape& s) { return {s.intermediate_size, s.act.gated, s.interleaved}; }

  std::size_t per_panel() const { return gated_ ? panel_columns / 2 : panel_columns; }
  std::size_t panels() const { return (features_ + per_panel() - 1) / per_panel(); }
  std::ptrdiff_t feature(std::size_t panel, int column) const {
    const bool up = gated_ && column >= panel_columns / 2;
    const std::size_t i = panel * per_panel() + column - (up ? panel_columns / 2 : 0);
    if (i >= features_) return -1;
    if (!gated_) return static_cast<std::ptrdiff_t>(i);
    return static_cast<std::ptrdiff_t>(interleaved_ ? 2 * i + up : i + (up ? features_ : 0));
  }

 private:
  column_map(std::size_t features, bool gated, bool interleaved)
      : features_(features), gated_(gated), interleaved_(interleaved) {}
  std::size_t features_;
  bool gated_, interleaved_;
};

// Calls f(address of (expert, n, k = 0) in `view`, panel data, column) for each column that is no padding.
template <class F>
void for_columns(const packed_weight& w, int expert, const weight_view& view, const column_map& columns, F f) {
  for (std::size_t p = 0; p < w.panels; ++p)
    for (int column = 0; column < panel_columns; ++column)
      if (const std::ptrdiff_t n = columns.feature(p, column); n >= 0)
        f(static_cast<char*>(view.data) +
              (expert * view.stride_expert + n * view.stride_n) * static_cast<std::ptrdiff_t>(size_of(view.type)),
          w.data.as<char>((expert * w.panels + p) * w.panel_bytes()), column);
}

void pack_weight(packed_weight& w, int expert, const weight_view& source, const column_map& columns, std::size_t k) {
  with_dtype(source.type, [&](auto from) {
    with_dtype(w.format, [&](auto to) {
      constexpr dtype From = from(), To = to();
      for_columns(w, expert, source, columns, [&](const char* row, char* panel, int column) {
        const auto* in = reinterpret_cast<const typename element<From>::storage*>(row);
        auto* out = reinterpret_cast<typename element<To>::storage*>(panel);
        for (std::size_t i = 0; i < k; ++i) out[place<To>(i, column)] = convert<From, To>(in[i * source.stride_k]);
      });
    });
  });
}

void unpack_weight(const packed_weight& w, int expert, const weight_view& target, const column_map& columns,
                   std::size_t k) {
  with_dtype(w.format, [&](auto from) {
    with_dtype(target.type, [&](auto to) {
      constexpr dtype From = from(), To = to();
      for_columns(w, expert, target, columns, [&](char* row, const char* panel, int column) {
        const auto* in = reinterpret_cast<const typename element<From>::storage*>(panel);
        auto* out = reinterpret_cast<typename element<To>::storage*>(row);
        for (std::size_t i = 0; i < k; ++i) out[i * target.stride_k] = convert<From, To>(in[place<From>(i, column)]);
      });
    });
  });
}

void pack_bias_of(packed_weight& w, int num_experts, const bias_view& source, const column_map& columns) {
  if (!source.data) return;
  w.bias = buffer(num_experts * w.panels * panel_columns * sizeof(float));
  with_dtype(source.type, [&](auto from) {
    constexpr dtype From = from();
    const auto* in = static_cast<const typename element<From>::storage*>(source.data);
    for (int e = 0; e < num_experts; ++e)
      for (std::size_t p = 0; p < w.panels; ++p)
        for (int column = 0; column < panel_columns; ++column)
          if (const std::ptrdiff_t n = columns.feature(p, column); n >= 0)
            w.bias.as<float>()[(e * w.panels + p) * panel_columns + column] =
                element<From>::get(in[e * source.stride_expert + n * source.stride_n]);
  });
}

packed_weight allocate(int num_experts, const column_map& columns, std::size_t k, dtype format) {
  packed_weight w;
  w.format = format;
  w.panels = columns.panels();
  w.k = (k + 1) / 2 * 2;
  w.data = buffer(num_experts * w.panels * w.panel_bytes());
  return w;
}

}  // namespace

experts::experts(const experts_shape& s, dtype format) : shape(s) {
  const column_map columns = column_map::gate_up(s);
  gate_up = allocate(s.num_experts, columns, s.hidden_size, format);
  // The activation writes whole panels, so the second reduction runs over them.
  down = allocate(s.num_experts, column_map::plain(s.hidden_size), columns.panels() * columns.per_panel(), format);
}

void experts::pack(int expert, const weight_view& gate_up_source, const weight_view& down_source) {
  pack_weight(gate_up, expert, gate_up_source, column_map::gate_up(shape), shape.hidden_size);
  pack_weight(down, expert, down_source, column_map::plain(shape.hidden_size), shape.intermediate_size);
}

void experts::pack_bias(const bias_view& gate_up_source, const bias_view& down_source) {
  pack_bias_of(gate_up, shape.num_experts, gate_up_source, column_map::gate_up(shape));
  pack_bias_of(down, shape.num_experts, down_source, column_map::plain(shape.hidden_size));
}

void experts::unpack(int expert, const weight_view& gate_up_target, const weight_view& down_target) const {
  unpack_weight(gate_up, expert, gate_up_target, column_map::gate_up(shape), shape.hidden_size);
  unpack_weight(down, expert, down_target, column_map::plain(shape.hidden_size), shape.intermediate_size);
}

std::size_t experts::bytes() const {
  return gate_up.data.bytes() + gate_up.bias.bytes() + down.data.bytes() + down.bias.bytes();
}

}  // namespace kt
