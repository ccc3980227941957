// Normalised rows against the order of summation that kt/norm.h defines, bit for bit, on every instruction set.
#include <cmath>
#include <random>

#include "check.h"
#include "floats.h"
#include "layer.h"

namespace {

using kt::dtype;

struct norm_case {
  std::size_t groups, rows, size;
  dtype type, weight_type;
  float offset;
  bool round_first;
};

std::string describe(const norm_case& c) {
  return std::to_string(c.groups) + " x " + std::to_string(c.rows) + " rows of " + std::to_string(c.size) + " " +
         name_of(c.type) + ", weight " + name_of(c.weight_type) + (c.offset != 0 ? " and an offset" : "") +
         (c.round_first ? ", rounded first" : "");
}

// `x` as it is read after it was stored in `type`.
float rounded(dtype type, float x) {
  elements one(type, 1);
  one.set(0, x);
  return static_cast<float>(one.get(0));
}

std::vector<float> defined(const norm_case& c, const float* x, const elements& weight) {
  float sums[32] = {};
  for (std::size_t i = 0; i < c.size; ++i) sums[i % 32] = std::fma(x[i], x[i], sums[i % 32]);
  for (int half = 16; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  const float scale = 1.0f / std::sqrt(sums[0] / static_cast<float>(c.size) + 1e-6f);
  std::vector<float> y(c.size);
  for (std::size_t i = 0; i < c.size; ++i) {
    const float first = c.round_first ? rounded(c.type, x[i] * scale) : x[i] * scale;
    y[i] = rounded(c.type, (static_cast<float>(weight.get(i)) + c.offset) * first);
  }
  return y;
}

void run_case(const norm_case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(-2.0, 2.0);
  constexpr std::size_t gap = 3;
  const std::size_t row = c.size + gap, group = c.rows * row + gap;
  elements in(c.type, c.groups * group), weight(c.weight_type, c.size), untouched(c.type, c.groups * group);
  for (std::size_t i = 0; i < c.groups * group; ++i) {
    in.set(i, NAN);
    untouched.set(i, 7.0);
  }
  for (std::size_t i = 0; i < c.size; ++i) weight.set(i, uniform(random));
  for (std::size_t g = 0; g < c.groups; ++g)
    for (std::size_t r = 0; r < c.rows; ++r)
      for (std::size_t i = 0; i < c.size; ++i) in.set(g * group + r * row + i, uniform(random));
  for (const kt::isa* i : isas)
    for (const int n : {1, 2}) {
      elements out = untouched;
      const auto stride = static_cast<std::ptrdiff_t>(row), groups = static_cast<std::ptrdiff_t>(group);
      threads(n).norm(*i->kernels,
                      {in.bytes.data(), groups, stride, out.bytes.data(), groups, stride, c.rows, c.type, c.size,
                       {weight.bytes.data(), c.weight_type, c.offset, 1e-6f, c.round_first}},
                      c.groups * c.rows);
      bool same = true;
      for (std::size_t g = 0; g < c.groups; ++g)
        for (std::size_t r = 0; r < c.rows; ++r) {
          std::vector<float> x(c.size);
          const std::size_t first = g * group + r * row;
          for (std::size_t k = 0; k < c.size; ++k) x[k] = static_cast<float>(in.get(first + k));
          const std::vector<float> wanted = defined(c, x.data(), weight);
          for (std::size_t k = 0; k < c.size; ++k) same &= static_cast<float>(out.get(first + k)) == wanted[k];
          for (std::size_t k = c.size; k < row; ++k) same &= out.get(first + k) == 7.0;
        }
      check(same, "norm of " + describe(c) + " [" + i->name + ", " + std::to_string(n) + " threads]");
    }
}

void test_norms() {
  unsigned seed = 0;
  for (const dtype type : dtypes)
    for (const dtype weight : {type, dtype::f32})
      for (const std::size_t size : {1, 8, 31, 33, 96, 200})
        for (const float offset : {0.0f, 1.0f})
          for (const bool round_first : {false, true})
            run_case({2, 3, size, type, weight, offset, round_first}, ++seed);
}

void test_many_rows() {
  run_case({1, quick ? 40ul : 400ul, 1000, dtype::bf16, dtype::bf16, 0.0f, true}, 1);
  run_case({7, 90, 128, dtype::f32, dtype::f32, 1.0f, false}, 2);
}

}  // namespace

const std::vector<test> norm_tests = {{"norms", test_norms}, {"norms of many rows", test_many_rows}};
