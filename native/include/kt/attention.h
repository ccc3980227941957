// The kernels of softmax attention of one instruction set, as plain functions over plain memory, and what they are
// called with.
//
// Positions of keys are cut into tiles of 64 and splits of 256, both from position 0 on, whatever is asked. A row is
// one query of one head. For each row, on every instruction set:
//   score   = sum over pairs of the head's dimensions ascending, in a pair odd before even, one fused multiply-add
//             each (what VDPBF16PS does);
//             t = score * (scale log2 e), or (softcap log2 e) * tanh(score * scale / softcap), plus mask * log2 e, and
//             -2^120 at least, infinite from 2^128 on; n = t to the nearest integer, f = 2^(t - n).
//   tile    m' = max(m, n), p = f 2^(n - m'), zero for positions that the row does not see;
//             sums[i] = sums[i] 2^(m - m') + p[i] + p[i + 16] + p[i + 32] + p[i + 48], for i in [0, 16);
//             out = out 2^(m - m') + sum of p * value over pairs of positions ascending, in a pair odd before even.
//             The split begins with m = -2^120, sums = out = 0.
//   splits  of what went before (m1) and the next split (m2), ascending: m = max(m1, m2),
//             x = x1 2^(m1 - m) + x2 2^(m2 - m) for sums and out.
//   result  out / (sum of sums by halves + e^sink 2^-m), or zero for a row that sees nothing.
// A tile or a split that a row does not see changes nothing in it, so it makes no difference which of them are run,
// how many rows there are and which thread runs a split. m is integral: beside another maximum all that is summed up
// differs by a power of two, exactly, but for numbers below 2^-126, which are zero.
//
// Where queries, keys and values are all bf16, p is rounded to bf16 before it is used: what values are weighted with
// and what the result is divided by are the same numbers. These are then summed in the order in which VDPBF16PS adds
// pairs, sums[i] = sums[i] 2^(m - m') + p[2 i + 1] + p[2 i] + p[2 i + 33] + p[2 i + 32]; but on AMX as above, where
// both products are summed as the weights of bf16 are (kernels/gemm_amx.inl): blocks of 32 dimensions or positions
// ascending, in a block the even and the odd products apart, then c = c + (even + odd), where c begins at zero for
// scores and at out 2^(m - m') for values.
//
// Keys and values may be codes of int8 with scales in fp32, each of a group of a row's elements: a code times its
// scale, rounded to fp32, is the element from then on.
#pragma once
#include <kt/layout.h>

#include <cstddef>
#include <cstdint>

namespace kt {

constexpr int attention_tile = 64, attention_split = 256;
constexpr int attention_sums = 16;
constexpr int attention_rows = 128;  // of a block, at most
constexpr float attention_lowest = -0x1p120f;

// Keys or values of the positions [0, count) of a tile: each `size` elements that lie together.
struct pack_tile_job {
  const void* const* rows;
  int count;
  dtype type;
  std::size_t size;
  // fp32. Keys: [2][size, made even][32], zero beyond `size` and `count`. Values: [panels of 32 columns][64][32],
  // likewise. bf16, pairs of dimensions or positions together: [2][size / 2, made a multiple of 16][32][2] and
  // [panels of 32 columns][32][32][2].
  void* packed;
  // Not null: a row is codes of int8, whatever `type` is, and element i of row j is code i times scales[j][i / group].
  const void* const* scales;
  std::size_t group;  // `size`, or a multiple of 16
};

// Rows of queries in fp32 or bf16, zero beyond `size`.
struct unpack_rows_job {
  const void* const* rows;
  int count;
  dtype type;
  std::size_t size, stride;
  void* unpacked;  // row r at r * stride, stride >= size
};

// What rows have summed up.
struct attention_state {
  float* max;         // [rows], integers
  float* sums;        // [rows][16]
  float* out;         // [rows][width]
  std::size_t width;  // columns of values in whole panels
};

enum class mask_type : std::uint8_t { none, boolean, f32, f16, bf16 };

// Rows that are fetched from memory meanwhile.
struct fetch_rows {
  const void* const* rows = nullptr;
  int count = 0;
  std::size_t bytes = 0;  // of each
};

struct attend_job {
  const void* queries;  // [rows][size]
  std::size_t size;     // of keys, a multiple of `key_unit`
  int rows;
  const void* keys;     // as packed
  const void* values;   // as packed
  std::size_t columns;  // of values
  bool finite;          // all values are; else positions of weight zero are left out one by one
  // Row r sees the positions [begin[r], end[r]) of the tile, which is none where begin >= end.
  const std::int32_t* begin;
  const std::int32_t* end;
  mask_type mask;
  const void* const* mask_rows;  // of each row, for the tile's first position; [count] are read
  int count;
  float scale;
  float softcap;  // 0: none
  float* scores;  // room for [rows][64]
  attention_state state;
  fetch_rows next[4];  // keys and values of the next tile, and their scales
};

struct merge_job {
  attention_state from;
  int rows;
  attention_state into;
};

struct finish_job {
  attention_state state;
  int rows;
  const float* sinks;  // of each row, or null
  void* const* out;    // where each row's `columns` go
  dtype type;
  std::size_t columns;
};

struct attention_kernels {
  std::size_t bytes, key_unit;  // of an element of packed rows; what keys' size is made a multiple of
  void (*unpack_rows)(const unpack_rows_job&);
  void (*pack_keys)(const pack_tile_job&);
  bool (*pack_values)(const pack_tile_job&);  // returns whether all are finite
  void (*attend)(const attend_job&);
  void (*merge)(const merge_job&);
  void (*finish)(const finish_job&);
};

}  // namespace kt
