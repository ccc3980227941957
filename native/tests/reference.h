// What layers compute: naive loops, with a bound on the error of a right result.
#pragma once
#include <cmath>
#include <numeric>
#include <vector>

#include "layer.h"

// Row t, column n at t * columns + n.
struct expected {
  std::vector<double> value, bound;
};

struct bounded {
  double value, bound;
};

constexpr double eps = 0x1p-24;

// A row in int8, as kt/kernels.h has it. `slack`: by how much a code may be off since `x` is known only within bounds.
struct int8_row {
  float scale = 0;
  double scale_error = 0;  // relative
  std::vector<int> codes, slack;

  // bounds: null if `x` is exact.
  int8_row(const float* x, const double* bounds, std::size_t n) : codes(n), slack(n) {
    float most = 0;
    double most_bound = 0;
    for (std::size_t i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
    for (std::size_t i = 0; bounds && i < n; ++i) most_bound = std::max(most_bound, bounds[i]);
    if (most < 0x1p-100f) return;
    const float inverse = 127.0f / most;
    scale = most / 127.0f;
    scale_error = most_bound / most;
    for (std::size_t i = 0; i < n; ++i) {
      const float steps = x[i] * inverse;
      codes[i] = static_cast<int>(std::nearbyint(steps));
      if (!bounds) continue;
      const double to_tie = 0.5 - std::fabs(steps - static_cast<double>(codes[i]));
      slack[i] = to_tie <= (bounds[i] * 1.01 + std::fabs(x[i]) * scale_error) * inverse + 1e-4;
    }
  }
};

// A row of a dynamic format: one for each group of k that has a scale of its own.
struct dynamic_row {
  std::vector<int8_row> groups;
  dynamic_row(const kt::weight_format& f, const float* x, const double* bounds, std::size_t n) {
    const std::size_t group = f.group ? f.group : n;
    for (std::size_t i = 0; i < n; i += group)
      groups.emplace_back(x + i, bounds ? bounds + i : nullptr, std::min(group, n - i));
  }
};

// The fp32 product of a row with output feature n of a dynamic format's weight, from k = begin on.
inline bounded dynamic_product(const dynamic_row& row, const random_weight& w, std::size_t expert, std::size_t n,
                               std::size_t begin) {
  float y = 0;
  double bound = 0, size = 0;
  for (const int8_row& group : row.groups) {
    std::int64_t sum = 0, slack = 0;
    for (std::size_t i = 0; i < group.codes.size(); ++i) {
      const auto code = static_cast<int>(w.code(expert, n, begin + i));
      sum += code * group.codes[i];
      slack += std::abs(code) * group.slack[i];
    }
    const float scale = w.scale(expert, n, begin) * group.scale, term = static_cast<float>(sum) * scale;
    y = w.format.group ? std::fma(scale, static_cast<float>(sum), y) : term;
    double off = static_cast<double>(slack) * std::fabs(scale);
    if (group.scale_error > 0) off += (group.scale_error + 4 * eps) * (std::fabs(term) + off);
    bound += off;
    size += std::fabs(term) + off;
    begin += group.codes.size();
  }
  if (bound > 0 && w.format.group) bound += 2 * eps * static_cast<double>(row.groups.size()) * size;
  return {y, bound};
}

inline double act(kt::activation kind, double x) {
  switch (kind) {
    case kt::activation::silu: return x / (1 + std::exp(-x));
    case kt::activation::gelu_tanh: return x / (1 + std::exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case kt::activation::gelu_erf: return 0.5 * x * std::erfc(-x * 0.70710678118654752);
    case kt::activation::relu: return x > 0 ? x : 0;
    default: return x > 0 ? x * x : 0;
  }
}

inline bounded activated(const kt::activation_spec& a, bounded gate, bounded up) {
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
  bounded h{left * up.value, 0};
  h.bound = slope * gate.bound * (std::fabs(up.value) + up.bound) + std::fabs(left) * up.bound +
            64 * eps * std::fabs(h.value) + 1e-36;
  return h;
}

// Sums of any order: products of floats, or of codes that are scaled.
class float_reference {
 public:
  explicit float_reference(const layer& l) : l_(l), first_(values(l.gate_up)), second_(values(l.down)) {}

  expected operator()() const {
    const layer_case& c = l_.c;
    expected x{std::vector<double>(c.tokens * c.hidden), std::vector<double>(c.tokens * c.hidden)};
    for (std::size_t i = 0; i < l_.ids.size(); ++i)
      if (l_.ids[i] < c.experts) add_expert(x, i / c.top_k, l_.ids[i], l_.weights.get(i));
    for (std::size_t i = 0; i < x.value.size(); ++i) {
      const double rounding = floats::unit(c.input) * (std::fabs(x.value[i]) + x.bound[i]);
      x.bound[i] = x.bound[i] * 1.01 + rounding + floats::smallest(c.input);
    }
    return x;
  }

 private:
  // Element (expert, n, k) at (expert * ns + n) * ks + k.
  static std::vector<double> values(const random_weight& w) {
    std::vector<double> all;
    all.reserve(w.experts * w.n * w.k);
    for (std::size_t e = 0; e < w.experts; ++e)
      for (std::size_t n = 0; n < w.n; ++n)
        for (std::size_t k = 0; k < w.k; ++k) all.push_back(w.value(e, n, k));
    return all;
  }

  // One output feature: its weights, and the place of its bias.
  bounded product(const double* w, const std::vector<double>& x, const elements& bias, std::size_t place) const {
    double value = 0, size = 0;
    for (std::size_t k = 0; k < x.size(); ++k) {
      const double term = x[k] * w[k];
      value += term;
      size += std::fabs(term);
    }
    if (l_.c.bias) {
      const double b = bias.get(place);
      value += b;
      size += std::fabs(b);
    }
    return {value, (static_cast<double>(x.size()) + 8) * eps * size + 1e-37};
  }

  void add_expert(expected& x, std::size_t t, std::size_t expert, double scale) const {
    const layer_case& c = l_.c;
    std::vector<double> row(c.hidden), h(c.intermediate), h_bound(c.intermediate);
    for (std::size_t k = 0; k < c.hidden; ++k) row[k] = l_.hidden.get(t * l_.hidden_stride() + k);
    const std::size_t step = c.interleaved ? 2 : 1, up = c.interleaved ? 1 : c.intermediate;
    for (std::size_t i = 0; i < c.intermediate; ++i) {
      const auto feature = [&](std::size_t n) {
        const std::size_t place = expert * l_.rows() + n;
        return product(first_.data() + place * c.hidden, row, l_.gate_up_bias, place);
      };
      const std::size_t first = c.act.gated ? step * i : i;
      const bounded gate = feature(first);
      const bounded a = activated(c.act, gate, c.act.gated ? feature(first + up) : gate);
      h[i] = a.value;
      h_bound[i] = a.bound;
      if (c.input == kt::dtype::bf16 && in_bf16(c.format.kind))
        h_bound[i] += floats::unit(kt::dtype::bf16) * (std::fabs(a.value) + a.bound);
    }
    for (std::size_t n = 0; n < c.hidden; ++n) {
      const double* w = second_.data() + (expert * c.hidden + n) * c.intermediate;
      const bounded y = product(w, h, l_.down_bias, expert * c.hidden + n);
      double bound = y.bound + 8 * eps * std::fabs(y.value);
      for (std::size_t i = 0; i < c.intermediate; ++i) bound += h_bound[i] * std::fabs(w[i]);
      x.value[t * c.hidden + n] += scale * y.value;
      x.bound[t * c.hidden + n] += std::fabs(scale) * (bound + (c.top_k + c.slices) * eps * std::fabs(y.value));
    }
  }

  const layer& l_;
  const std::vector<double> first_, second_;
};

// int8_dyn in fp32 as the kernels have it. Exact but for activations that have an exponential.
class dynamic_reference {
 public:
  explicit dynamic_reference(const layer& l) : l_(l) {
    using kt::activation;
    exact_ = l.c.act.kind == activation::relu || l.c.act.kind == activation::relu2;
  }

  expected operator()() const {
    const layer_case& c = l_.c;
    expected x;
    for (std::size_t t = 0; t < c.tokens; ++t) {
      std::vector<bounded> out(c.hidden, bounded{0, 0});
      for (int s = 0; s < c.slices; ++s) {
        const std::vector<bounded> part = slice(t, s);
        for (std::size_t n = 0; n < c.hidden; ++n)
          out[n] = {static_cast<float>(out[n].value) + static_cast<float>(part[n].value), out[n].bound + part[n].bound};
      }
      for (const bounded& y : out) {
        const double rounding = exact_ ? 0 : floats::unit(c.input) * (std::fabs(y.value) + y.bound);
        x.value.push_back(floats::round_to(y.value, c.input));
        x.bound.push_back(y.bound * 1.01 + 2 * rounding + floats::smallest(c.input));
      }
    }
    return x;
  }

 private:
  // The sum over the experts of token t, ascending.
  std::vector<bounded> slice(std::size_t t, int s) const {
    const layer_case& c = l_.c;
    std::vector<std::size_t> slots(c.top_k);
    std::iota(slots.begin(), slots.end(), t * c.top_k);
    std::stable_sort(slots.begin(), slots.end(), [&](auto a, auto b) { return l_.ids[a] < l_.ids[b]; });
    std::vector<float> row(c.hidden);
    for (std::size_t k = 0; k < c.hidden; ++k) row[k] = static_cast<float>(l_.hidden.get(t * l_.hidden_stride() + k));
    const dynamic_row input(c.format, row.data(), nullptr, c.hidden);
    const std::size_t begin = slice_begin(s), size = slice_begin(s + 1) - begin;
    std::vector<bounded> sum(c.hidden, bounded{0, 0});
    for (std::size_t slot : slots) {
      const std::int64_t expert = l_.ids[slot];
      if (expert >= c.experts) continue;
      const dynamic_row h = hidden_row(input, expert, begin, size);
      const auto weight = static_cast<float>(l_.weights.get(slot));
      for (std::size_t n = 0; n < c.hidden; ++n) {
        bounded y = dynamic_product(h, l_.down, expert, n, begin);
        if (c.bias && s == 0) y.value = plus(y.value, l_.down_bias.get(expert * c.hidden + n));
        const float total = std::fma(weight, static_cast<float>(y.value), static_cast<float>(sum[n].value));
        sum[n].bound += std::fabs(weight) * y.bound + (exact_ ? 0 : 8 * eps * std::fabs(total));
        sum[n].value = total;
      }
    }
    return sum;
  }

  // Slices begin at multiples of 128.
  std::size_t slice_begin(int s) const {
    const std::size_t steps = (l_.c.intermediate + 127) / 128;
    return std::min(l_.c.intermediate, steps * s / l_.c.slices * 128);
  }

  dynamic_row hidden_row(const dynamic_row& input, std::size_t expert, std::size_t begin, std::size_t size) const {
    const layer_case& c = l_.c;
    std::vector<float> h(size);
    std::vector<double> bounds(size);
    const std::size_t step = c.interleaved ? 2 : 1, up = c.interleaved ? 1 : c.intermediate;
    for (std::size_t i = 0; i < size; ++i) {
      const auto feature = [&](std::size_t n) {
        bounded y = dynamic_product(input, l_.gate_up, expert, n, 0);
        if (c.bias) y.value = plus(y.value, l_.gate_up_bias.get(expert * l_.rows() + n));
        return y;
      };
      const std::size_t first = c.act.gated ? step * (begin + i) : begin + i;
      const bounded gate = feature(first), other = c.act.gated ? feature(first + up) : gate;
      const bounded a = exact_ ? bounded{relu(gate.value, other.value), 0} : activated(c.act, gate, other);
      h[i] = static_cast<float>(a.value);
      bounds[i] = a.bound;
    }
    return {c.format, h.data(), exact_ ? nullptr : bounds.data(), size};
  }

  static float plus(double a, double b) { return static_cast<float>(a) + static_cast<float>(b); }

  float relu(double gate, double up) const {
    auto g = static_cast<float>(gate), u = static_cast<float>(up);
    const float limit = l_.c.act.limit;
    if (limit > 0 && l_.c.act.gated) {
      g = std::min(g, limit);
      u = std::clamp(u, -limit, limit);
    }
    g = g > 0 ? g : 0;
    if (l_.c.act.kind == kt::activation::relu2) g = g * g;
    return l_.c.act.gated ? g * u : g;
  }

  const layer& l_;
  bool exact_;
};

inline expected reference(const layer& l) {
  return is_dynamic(l.c.format.kind) ? dynamic_reference(l)() : float_reference(l)();
}
