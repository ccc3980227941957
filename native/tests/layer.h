// A random MoE layer with its inputs, and what it computes: a naive loop in double, with a bound on the error of
// any fp32 summation.
#pragma once
#include <kt/experts.h>
#include <kt/moe.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "floats.h"

struct layer_case {
  int experts = 5, top_k = 3;
  std::size_t hidden = 72, intermediate = 56, tokens = 7;
  kt::dtype source = kt::dtype::bf16, format = kt::dtype::bf16, input = kt::dtype::bf16;
  kt::activation_spec act;
  bool interleaved = false, transposed = false, bias = false;
  kt::dtype routing = kt::dtype::f32;
  kt::id_type ids = kt::id_type::i64;
};

inline const char* name_of(kt::dtype t) { return t == kt::dtype::f32 ? "fp32" : t == kt::dtype::f16 ? "fp16" : "bf16"; }

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
  s += std::string(" source ") + name_of(c.source) + " format " + name_of(c.format) + " input " + name_of(c.input);
  s += std::string(" ") + name_of(c.act.kind) + (c.act.gated ? " gated" : " plain");
  if (c.act.limit > 0) s += " limit " + std::to_string(c.act.limit);
  s += c.interleaved ? " interleaved" : " concatenated";
  if (c.transposed) s += " transposed";
  if (c.bias) s += " bias";
  return s;
}

// Elements of one dtype in memory of exactly their size, so that a sanitizer sees each access beyond them.
struct elements {
  kt::dtype type;
  std::vector<char> bytes;
  elements(kt::dtype t, std::size_t n) : type(t), bytes(n * size_of(t)) {}
  void set(std::size_t i, double x) { floats::store(bytes.data(), type, i, x); }
  double get(std::size_t i) const { return floats::load(bytes.data(), type, i); }
  std::size_t size() const { return bytes.size() / size_of(type); }
};

constexpr std::size_t hidden_gap = 5, out_gap = 3;  // columns between rows, which no kernel may use or change

class layer {
 public:
  layer_case c;
  elements gate_up, down, gate_up_bias, down_bias, hidden, weights;
  std::vector<std::int64_t> ids;

  layer(const layer_case& k, unsigned seed)
      : c(k),
        gate_up(c.source, c.experts * rows() * c.hidden),
        down(c.source, c.experts * c.hidden * c.intermediate),
        gate_up_bias(c.source, c.experts * rows()),
        down_bias(c.source, c.experts * c.hidden),
        hidden(c.input, c.tokens * hidden_stride()),
        weights(c.routing, c.tokens * c.top_k),
        ids(c.tokens * c.top_k),
        random_(seed) {
    fill(gate_up, 1.7 / std::sqrt(static_cast<double>(c.hidden)));
    fill(down, 1.7 / std::sqrt(static_cast<double>(c.intermediate)));
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

  kt::weight_view gate_up_view(elements& e) const { return view(e, rows(), c.hidden); }
  kt::weight_view down_view(elements& e) const { return view(e, c.hidden, c.intermediate); }

  kt::experts pack() {
    kt::experts_shape shape;
    shape.num_experts = c.experts;
    shape.hidden_size = c.hidden;
    shape.intermediate_size = c.intermediate;
    shape.act = c.act;
    shape.interleaved = c.interleaved;
    kt::experts e(shape, c.format);
    for (int i = 0; i < c.experts; ++i) e.pack(i, gate_up_view(gate_up), down_view(down));
    if (c.bias)
      e.pack_bias({gate_up_bias.bytes.data(), c.source, static_cast<std::ptrdiff_t>(rows()), 1},
                  {down_bias.bytes.data(), c.source, static_cast<std::ptrdiff_t>(c.hidden), 1});
    return e;
  }

  // What the naive loop gives for row t, column n, and how far a right result may be from it.
  struct expected {
    std::vector<double> value, bound;
  };

  expected reference() const {
    expected x{std::vector<double>(c.tokens * c.hidden), std::vector<double>(c.tokens * c.hidden)};
    const std::vector<double> first = weights_of(gate_up, rows(), c.hidden);
    const std::vector<double> second = weights_of(down, c.hidden, c.intermediate);
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < c.experts) add_expert(x, i / c.top_k, ids[i], weights.get(i), first.data(), second.data());
    for (std::size_t i = 0; i < x.value.size(); ++i) {
      const double rounding = floats::unit(c.input) * (std::fabs(x.value[i]) + x.bound[i]);
      x.bound[i] = x.bound[i] * 1.01 + rounding + floats::smallest(c.input);
    }
    return x;
  }

 private:
  static constexpr double eps = 0x1p-24;

  kt::weight_view view(elements& e, std::size_t n, std::size_t k) const {
    const auto sn = static_cast<std::ptrdiff_t>(c.transposed ? 1 : k);
    const auto sk = static_cast<std::ptrdiff_t>(c.transposed ? n : 1);
    return {e.bytes.data(), e.type, static_cast<std::ptrdiff_t>(n * k), sn, sk};
  }

  void fill(elements& e, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    for (std::size_t i = 0; i < e.size(); ++i) {
      const unsigned kind = random_() % 64;
      e.set(i, kind == 0 ? 1e-39 : kind == 1 ? -0.0 : uniform(random_));  // a few denormals: they count as zero
    }
  }

  // The weights of all experts as they are after packing, element (expert, n, k) at (expert * ns + n) * ks + k.
  std::vector<double> weights_of(const elements& e, std::size_t ns, std::size_t ks) const {
    std::vector<double> w(e.size());
    for (std::size_t i = 0; i < w.size(); ++i) {
      const std::size_t expert = i / (ns * ks), n = i / ks % ns, k = i % ks;
      w[i] = floats::round_to(e.get(expert * ns * ks + (c.transposed ? k * ns + n : n * ks + k)), c.format);
    }
    return w;
  }

  struct sum {
    double value, bound;
  };

  // One output feature: its weights, and the place of its bias.
  sum product(const double* w, const std::vector<double>& x, const elements& bias, std::size_t place) const {
    double value = 0, size = 0;
    for (std::size_t k = 0; k < x.size(); ++k) {
      const double term = x[k] * w[k];
      value += term;
      size += std::fabs(term);
    }
    if (c.bias) {
      const double b = bias.get(place);
      value += b;
      size += std::fabs(b);
    }
    return {value, (static_cast<double>(x.size()) + 4) * eps * size + 1e-37};
  }

  static double act(kt::activation kind, double x) {
    switch (kind) {
      case kt::activation::silu: return x / (1 + std::exp(-x));
      case kt::activation::gelu_tanh: return x / (1 + std::exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)));
      case kt::activation::gelu_erf: return 0.5 * x * std::erfc(-x * 0.70710678118654752);
      case kt::activation::relu: return x > 0 ? x : 0;
      default: return x > 0 ? x * x : 0;
    }
  }

  sum activated(sum gate, sum up) const {
    const kt::activation_spec& a = c.act;
    double slope = a.kind == kt::activation::relu2 ? 2 * (std::fabs(gate.value) + gate.bound) : 1.2;
    if (!a.gated) up = {1, 0};
    if (a.limit > 0) {
      gate.value = std::min(gate.value, static_cast<double>(a.limit));
      up.value = std::clamp(up.value, -static_cast<double>(a.limit), static_cast<double>(a.limit));
    }
    double left = act(a.kind, gate.value);
    if (a.kind == kt::activation::swigluoai) {
      left = gate.value / (1 + std::exp(-static_cast<double>(a.alpha) * gate.value));
      up.value += 1;
    }
    sum h{left * up.value, 0};
    h.bound = slope * gate.bound * (std::fabs(up.value) + up.bound) + std::fabs(left) * up.bound +
              64 * eps * std::fabs(h.value) + 1e-36;
    if (c.input == kt::dtype::bf16 && c.format == kt::dtype::bf16)
      h.bound += floats::unit(kt::dtype::bf16) * (std::fabs(h.value) + h.bound);
    return h;
  }

  void add_expert(expected& x, std::size_t t, std::size_t expert, double scale, const double* first_product,
                  const double* second_product) const {
    std::vector<double> row(c.hidden), h(c.intermediate), h_bound(c.intermediate);
    for (std::size_t k = 0; k < c.hidden; ++k) row[k] = hidden.get(t * hidden_stride() + k);
    const std::size_t step = c.interleaved ? 2 : 1, up = c.interleaved ? 1 : c.intermediate;
    for (std::size_t i = 0; i < c.intermediate; ++i) {
      const auto feature = [&](std::size_t n) {
        return product(first_product + (expert * rows() + n) * c.hidden, row, gate_up_bias, expert * rows() + n);
      };
      const std::size_t first = c.act.gated ? step * i : i;
      const sum gate = feature(first), a = activated(gate, c.act.gated ? feature(first + up) : gate);
      h[i] = a.value;
      h_bound[i] = a.bound;
    }
    for (std::size_t n = 0; n < c.hidden; ++n) {
      const double* w = second_product + (expert * c.hidden + n) * c.intermediate;
      const sum y = product(w, h, down_bias, expert * c.hidden + n);
      double bound = y.bound + 8 * eps * std::fabs(y.value);
      for (std::size_t i = 0; i < c.intermediate; ++i) bound += h_bound[i] * std::fabs(w[i]);
      x.value[t * c.hidden + n] += scale * y.value;
      x.bound[t * c.hidden + n] += std::fabs(scale) * (bound + c.top_k * eps * std::fabs(y.value));
    }
  }

  std::mt19937 random_;
};

// What a call returned: the text of its error, and the rows without the gaps.
struct outcome {
  std::string error;
  std::vector<char> rows;
  bool gaps_kept = true;
};

inline outcome run(kt::context& context, const kt::experts& e, const kt::kernel_table& kernels, const layer& l) {
  const std::size_t guard = 64;
  elements out(l.c.input, l.c.tokens * l.out_stride() + guard);
  for (std::size_t i = 0; i < out.size(); ++i) out.set(i, NAN);
  std::vector<char> before = out.bytes;
  std::vector<std::int32_t> short_ids(l.ids.begin(), l.ids.end());
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
  const std::size_t row = l.c.hidden * size_of(l.c.input), stride = l.out_stride() * size_of(l.c.input);
  for (std::size_t t = 0; t < l.c.tokens; ++t) {
    result.rows.insert(result.rows.end(), out.bytes.begin() + t * stride, out.bytes.begin() + t * stride + row);
    std::copy_n(before.begin() + t * stride, row, out.bytes.begin() + t * stride);
  }
  result.gaps_kept = out.bytes == before;
  return result;
}
