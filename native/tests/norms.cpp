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
                      {in.bytes.data(),
                       groups,
                       stride,
                       out.bytes.data(),
                       groups,
                       stride,
                       c.rows,
                       c.type,
                       c.size,
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

elements numbers(dtype type, std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(-2.0, 2.0);
  elements x(type, count);
  for (std::size_t i = 0; i < count; ++i) x.set(i, uniform(random));
  return x;
}

bool same_bits(const elements& a, const elements& b) { return a.bytes == b.bytes; }

void test_sums_before_norms() {
  for (const dtype type : dtypes)
    for (const std::size_t size : {7, 32, 100}) {
      const elements x = numbers(type, 3 * size, 1), addend = numbers(type, 3 * size, 2),
                     weight = numbers(type, size, 3);
      elements sum(type, 3 * size);
      for (std::size_t i = 0; i < 3 * size; ++i)
        sum.set(i, static_cast<float>(x.get(i)) + static_cast<float>(addend.get(i)));
      const auto stride = static_cast<std::ptrdiff_t>(size);
      const kt::norm_weight w{weight.bytes.data(), type, 0.0f, 1e-6f, false};
      for (const kt::isa* i : isas) {
        elements wanted(type, 3 * size), got(type, 3 * size), total(type, 3 * size);
        threads(1).norm(*i->kernels, {sum.bytes.data(), 0, stride, wanted.bytes.data(), 0, stride, 3, type, size, w},
                        3);
        threads(1).norm(*i->kernels,
                        {x.bytes.data(), 0, stride, got.bytes.data(), 0, stride, 3, type, size, w, addend.bytes.data(),
                         total.bytes.data()},
                        3);
        check(same_bits(total, sum) && same_bits(got, wanted),
              std::string("norm of a sum of ") + name_of(type) + " [" + i->name + "]");
      }
    }
}

void test_rotary() {
  for (const dtype type : dtypes)
    for (const auto& [size, turned] : {std::pair<std::size_t, std::size_t>{8, 8}, {20, 6}, {130, 128}, {33, 2}}) {
      constexpr std::size_t heads = 3, positions = 5, sequences = 2;
      const std::size_t count = sequences * positions * heads;
      const elements x = numbers(type, count * size, 4), cos = numbers(type, sequences * positions * turned, 5);
      const elements sin = numbers(type, sequences * positions * turned, 6);
      elements wanted(type, count * size);
      const auto at = [](const elements& e, std::size_t i) { return static_cast<float>(e.get(i)); };
      for (std::size_t row = 0; row < count; ++row)
        for (std::size_t i = 0; i < size; ++i) {
          const std::size_t first = row * size, angle = row / heads * turned + i, half = turned / 2;
          if (i >= turned) {
            wanted.set(first + i, at(x, first + i));
            continue;
          }
          const float other = i < half ? -at(x, first + i + half) : at(x, first + i - half);
          wanted.set(first + i,
                     rounded(type, at(x, first + i) * at(cos, angle)) + rounded(type, other * at(sin, angle)));
        }
      for (const kt::isa* i : isas) {
        elements out(type, count * size);
        kt::rotary_job job{};
        job.in = x.bytes.data();
        job.out = out.bytes.data();
        const auto s = static_cast<std::ptrdiff_t>(size), h = static_cast<std::ptrdiff_t>(heads * size);
        for (auto* strides : {job.in_strides, job.out_strides}) {
          strides[0] = static_cast<std::ptrdiff_t>(positions) * h;
          strides[1] = h;
          strides[2] = s;
        }
        job.positions = positions;
        job.heads = heads;
        job.type = type;
        job.size = size;
        job.rotated = turned;
        job.cos = cos.bytes.data();
        job.sin = sin.bytes.data();
        job.angle_strides[0] = static_cast<std::ptrdiff_t>(positions * turned);
        job.angle_strides[1] = static_cast<std::ptrdiff_t>(turned);
        threads(2).rotary(*i->kernels, job, count);
        check(same_bits(out, wanted), "rotary of " + std::to_string(turned) + " of " + std::to_string(size) + " " +
                                          name_of(type) + " [" + i->name + "]");
      }
    }
}

void test_elementwise() {
  for (const dtype type : dtypes)
    for (const std::size_t size : {1, 8, 33}) {
      const elements a = numbers(type, 4 * size, 7), b = numbers(type, 4 * size, 8);
      for (int op = 0; op <= static_cast<int>(kt::element_op::gelu_erf); ++op)
        for (const bool single : {false, true}) {
          elements first(dtype::f32, 4 * size);
          for (const kt::isa* i : isas) {
            elements out(dtype::f32, 4 * size);
            const auto stride = static_cast<std::ptrdiff_t>(size);
            i->kernels->elementwise({static_cast<kt::element_op>(op), a.bytes.data(), stride, b.bytes.data(),
                                     single ? 1 : stride, single, type, out.bytes.data(), dtype::f32, size},
                                    0, 4);
            if (i == isas.front()) first = out;
            bool near = same_bits(out, first);
            for (std::size_t k = 0; k < 4 * size; ++k) {
              const double x = a.get(k), y = b.get(single ? k / size : k), sigmoid = 1 / (1 + std::exp(-x));
              const double c = 0.7978845608028654 * (x + 0.044715 * x * x * x);
              const double results[] = {x,
                                        x + y,
                                        x - y,
                                        x * y,
                                        x / y,
                                        x * sigmoid,
                                        sigmoid,
                                        0.5 * x * (1 + std::tanh(c)),
                                        0.5 * x * (1 + std::erf(x / std::sqrt(2.0)))};
              near &= std::fabs(out.get(k) - results[op]) <= 2e-6 * (1 + std::fabs(results[op]));
            }
            check(near, "elementwise " + std::to_string(op) + " of " + name_of(type) + " [" + i->name + "]");
          }
        }
    }
}

void test_softmax() {
  for (const dtype type : dtypes)
    for (const std::size_t size : {1, 7, 64, 100}) {
      const elements x = numbers(type, 3 * size, 9);
      elements first(dtype::f32, 3 * size);
      for (const kt::isa* i : isas) {
        elements out(dtype::f32, 3 * size);
        i->kernels->softmax(
            {x.bytes.data(), type, static_cast<std::ptrdiff_t>(size), reinterpret_cast<float*>(out.bytes.data()), size},
            0, 3);
        if (i == isas.front()) first = out;
        bool near = same_bits(out, first);
        for (std::size_t r = 0; r < 3; ++r) {
          double sum = 0;
          for (std::size_t k = 0; k < size; ++k) sum += std::exp(x.get(r * size + k));
          for (std::size_t k = 0; k < size; ++k)
            near &= std::fabs(out.get(r * size + k) - std::exp(x.get(r * size + k)) / sum) < 1e-6;
        }
        check(near, "softmax of " + std::to_string(size) + " " + name_of(type) + " [" + i->name + "]");
      }
    }
}

}  // namespace

const std::vector<test> norm_tests = {{"norms", test_norms},
                                      {"norms of many rows", test_many_rows},
                                      {"sums before norms", test_sums_before_norms},
                                      {"rotary embedding", test_rotary},
                                      {"elementwise", test_elementwise},
                                      {"softmax", test_softmax}};
