// A random MoE layer with its inputs, and a call of it.
#pragma once
#include <kt/context.h>
#include <kt/experts.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "weights.h"

struct layer_case {
  int experts = 5, top_k = 3;
  std::size_t hidden = 72, intermediate = 56, tokens = 7;
  kt::weight_format format;
  kt::dtype source = kt::dtype::bf16, input = kt::dtype::bf16;  // source: of the biases, and of weights of floats
  kt::activation_spec act;
  bool interleaved = false, transposed = false, bias = false;
  kt::dtype routing = kt::dtype::f32;
  kt::id_type ids = kt::id_type::i64;
  int slices = 1;
};

inline const char* name_of(kt::activation a) {
  static const char* const names[] = {"silu", "gelu_tanh", "gelu_erf", "relu", "relu2", "swigluoai"};
  return names[static_cast<int>(a)];
}

inline std::string describe(const layer_case& c) {
  std::string s;
  const auto add = [&s](const char* name, std::size_t value) { s.append(name).append(std::to_string(value)); };
  add("E", c.experts);
  add(" top", c.top_k);
  add(" H", c.hidden);
  add(" I", c.intermediate);
  add(" T", c.tokens);
  s += " format " + name_of(c.format) + " source " + name_of(c.source) + " input " + name_of(c.input);
  s += std::string(" ") + name_of(c.act.kind) + (c.act.gated ? " gated" : " plain");
  if (c.act.limit > 0) s += " limit " + std::to_string(c.act.limit);
  s += c.interleaved ? " interleaved" : " concatenated";
  if (c.transposed) s += " transposed";
  if (c.bias) s += " bias";
  if (c.slices > 1) add(" slices ", c.slices);
  return s;
}

constexpr std::size_t hidden_gap = 5, out_gap = 3;  // columns between rows, which no kernel may use or change

class layer {
  std::mt19937 random_;

 public:
  layer_case c;
  random_weight gate_up, down;
  elements gate_up_bias, down_bias, hidden, weights;
  std::vector<std::int64_t> ids;

  layer(const layer_case& k, unsigned seed)
      : random_(seed),
        c(k),
        gate_up(c.format, c.source, c.experts, rows(), c.hidden, c.transposed, size_for(c.hidden), random_),
        down(c.format, c.source, c.experts, c.hidden, c.intermediate, c.transposed, size_for(c.intermediate), random_),
        gate_up_bias(c.source, c.experts * rows()),
        down_bias(c.source, c.experts * c.hidden),
        hidden(c.input, c.tokens * hidden_stride()),
        weights(c.routing, c.tokens * c.top_k),
        ids(c.tokens * c.top_k) {
    fill(gate_up_bias, 0.5);
    fill(down_bias, 0.5);
    fill(hidden, 1.7);
    fill(weights, 1.0);
    for (std::size_t t = 0; t < c.tokens; ++t) {
      for (std::size_t g = c.hidden; g < hidden_stride(); ++g) hidden.set(t * hidden_stride() + g, NAN);
      for (int s = 0; s < c.top_k; ++s) ids[t * c.top_k + s] = (random_() % 64 + s) % c.experts;
    }
  }

  std::size_t rows() const { return c.act.gated ? 2 * c.intermediate : c.intermediate; }
  std::size_t hidden_stride() const { return c.hidden + hidden_gap; }
  std::size_t out_stride() const { return c.hidden + out_gap; }

  kt::experts pack() {
    kt::experts_shape shape;
    shape.num_experts = c.experts;
    shape.hidden_size = c.hidden;
    shape.intermediate_size = c.intermediate;
    shape.act = c.act;
    shape.interleaved = c.interleaved;
    kt::experts e(shape, c.format, std::vector<int>(c.slices, -1));
    for (int i = 0; i < c.experts; ++i) {
      if (is_float(c.format.kind))
        e.pack(i, gate_up.plain_view(gate_up.plain), down.plain_view(down.plain));
      else
        e.pack(i, gate_up.quantized_view(), down.quantized_view());
    }
    if (c.bias)
      e.pack_bias({gate_up_bias.bytes.data(), c.source, static_cast<std::ptrdiff_t>(rows()), 1},
                  {down_bias.bytes.data(), c.source, static_cast<std::ptrdiff_t>(c.hidden), 1});
    return e;
  }

 private:
  static double size_for(std::size_t k) { return 1.7 / std::sqrt(static_cast<double>(k)); }

  void fill(elements& e, double size) {
    std::uniform_real_distribution<double> uniform(-size, size);
    for (std::size_t i = 0; i < e.size(); ++i) {
      const unsigned kind = random_() % 64;
      e.set(i, kind == 0 ? 1e-39 : kind == 1 ? -0.0 : uniform(random_));  // a few denormals: they count as zero
    }
  }
};

// What a call returned: the text of its error, and the rows without the gaps.
struct outcome {
  std::string error;
  std::vector<char> rows;
  bool gaps_kept = true;
};

// The rows that were written to `out`, which was `before`.
inline void take_rows(outcome& result, elements& out, const std::vector<char>& before, std::size_t rows,
                      std::size_t columns, std::size_t stride) {
  const std::size_t row = columns * size_of(out.type), step = stride * size_of(out.type);
  for (std::size_t r = 0; r < rows; ++r) {
    result.rows.insert(result.rows.end(), out.bytes.begin() + r * step, out.bytes.begin() + r * step + row);
    std::copy_n(before.begin() + r * step, row, out.bytes.begin() + r * step);
  }
  result.gaps_kept = out.bytes == before;
}

constexpr std::size_t guard = 64;  // elements behind the last row

inline outcome run(kt::context& context, const kt::experts& e, const kt::kernel_table& kernels, const layer& l) {
  elements out(l.c.input, l.c.tokens * l.out_stride() + guard);
  for (std::size_t i = 0; i < out.size(); ++i) out.set(i, NAN);
  const std::vector<char> before = out.bytes;
  const std::vector<std::int32_t> short_ids(l.ids.begin(), l.ids.end());
  kt::moe_arguments a;
  a.tokens = l.c.tokens;
  a.top_k = l.c.top_k;
  a.hidden = l.hidden.bytes.data();
  a.hidden_type = l.c.input;
  a.hidden_stride = l.hidden_stride();
  a.ids_type = l.c.ids;
  a.ids = l.c.ids == kt::id_type::i64 ? static_cast<const void*>(l.ids.data()) : short_ids.data();
  a.weights = l.weights.bytes.data();
  a.weights_type = l.c.routing;
  a.out = out.bytes.data();
  a.out_stride = l.out_stride();
  outcome result;
  result.error = context.moe(e, kernels, a);
  take_rows(result, out, before, l.c.tokens, l.c.hidden, l.out_stride());
  return result;
}
