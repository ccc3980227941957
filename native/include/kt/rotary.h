// Rotary position embedding of heads, of the kind that pairs element i with element i + rotated / 2.
//
// With a, b a pair, c, s cosines and sines: a' = a c - b s, b' = b c + a s, each product and each sum rounded to the
// type of the heads. What it computes is what its parts would, one after the other.
#pragma once
#include <kt/norm.h>

#include <cstddef>

namespace kt {

// A head is at base + sequence * strides[0] + position * strides[1] + head * strides[2] elements.
struct rotary_job {
  const void* in;
  std::ptrdiff_t in_strides[3];
  void* out;  // of the type of `in`, and not where it is
  std::ptrdiff_t out_strides[3];
  std::size_t positions, heads;
  dtype type;
  std::size_t size, rotated;  // elements of a head; how many of them, from the first on, are rotated
  const void *cos, *sin;      // [sequence][position][rotated], of the type of `in`
  std::ptrdiff_t angle_strides[2];
  norm_weight norm;  // heads are normalised first, unless its address is null
};

// Heads, counted over all positions and sequences.
using rotary_kernel = void (*)(const rotary_job&, std::size_t begin, std::size_t end);

}  // namespace kt
