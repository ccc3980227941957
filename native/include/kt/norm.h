// Root-mean-square normalisation.
//
// Order of summation on every instruction set: 32 partial sums, of the elements i with i % 32 = 0, 1, ..., each one
// fused multiply-add after the other; then the upper half of the sums is added to the lower, five times.
#pragma once
#include <kt/layout.h>

#include <cstddef>

namespace kt {

struct norm_weight {
  const void* values;
  dtype type;
  float offset;  // is added to each
  float epsilon;
  bool round_first;  // the normalised row is rounded to the type of rows before it is multiplied
};

// Row r of group g is at in + (g * group_stride + r * row_stride) elements; results likewise, with strides of their
// own.
struct norm_job {
  const void* in;
  std::ptrdiff_t group_stride, row_stride;
  void* out;  // of the type of `in`
  std::ptrdiff_t out_group_stride, out_row_stride;
  std::size_t rows;  // of a group
  dtype type;
  std::size_t size;  // of a row
  norm_weight weight;
  // Not null: the rows of `addend`, which lie as those of `in`, are added first, and the sums, rounded to `type`, are
  // written to `sum`, which lies as `out`.
  const void* addend = nullptr;
  void* sum = nullptr;
};

using norm_kernel = void (*)(const norm_job&, std::size_t begin, std::size_t end);  // rows, counted over all groups

}  // namespace kt
