// Operations on rows of elements, each rounded to the type of the result: what torch does one at a time.
#pragma once
#include <kt/layout.h>

#include <cstddef>
#include <cstdint>

namespace kt {

enum class element_op : std::uint8_t { copy, add, sub, mul, div, silu, sigmoid, gelu_tanh, gelu_erf, cos, sin };

// out = op(a) or op(a, b); rows of `out` lie together, those of a and b `stride` elements apart. Cosines and sines are
// rounded once from double: to 0.5001 ulp up to 2^20, beyond as the C library has them.
struct elementwise_job {
  element_op op;
  const void* a;
  std::ptrdiff_t a_stride;
  const void* b;  // null: there is none, or it is `number`
  std::ptrdiff_t b_stride;
  bool b_single;  // b has one element for each row
  dtype type;     // of a and b
  void* out;
  dtype out_type;
  std::size_t size;  // of a row
  float number = 0;  // b of all elements
};

// out = e^(x - max) / sum. Order of summation: 32 partial sums, of the elements i with i % 32 = 0, 1, ...; then the
// upper half of the sums is added to the lower, five times.
struct softmax_job {
  const void* in;
  dtype type;
  std::ptrdiff_t stride;
  float* out;  // rows lie together
  std::size_t size;
};

using elementwise_kernel = void (*)(const elementwise_job&, std::size_t begin, std::size_t end);
using softmax_kernel = void (*)(const softmax_job&, std::size_t begin, std::size_t end);

}  // namespace kt
