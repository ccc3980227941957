// The kernels of one instruction set, as plain functions over plain memory.
//
// Weights lie as kt/layout.h says, the same for every instruction set.
//
// Packed activations: rows are cut into tiles of at most `max_rows` rows; a tile is [K/unit][rows][unit], so that a
// kernel reads one stream. The unit is 1 for fp32, 2 for bf16 pairs, 4 for int8, and a tile's row of 64 bytes for AMX.
// The kernels cut a block of rows into tiles of near-equal size themselves.
//
// Order of summation of all formats but int8_dyn and int4_dyn, on every instruction set but AMX: pairs of k ascending,
// in a pair odd before even, one fused multiply-add each. It is what VDPBF16PS does, so all kernels give the same bits.
// Formats with a scale for each group of k sum the group from zero, then add scale * sum, one fused multiply-add,
// groups ascending; formats with a scale for each column multiply by it at the end. int8_dyn sums integers. int4_dyn
// does so in each group, and adds (scale of the column * scale of the row) * sum, one fused multiply-add, groups
// ascending.
#pragma once
#include <kt/attention.h>
#include <kt/elementwise.h>
#include <kt/layout.h>
#include <kt/norm.h>
#include <kt/rotary.h>

#include <cstddef>
#include <cstdint>

namespace kt {

enum class activation : std::uint8_t {
  silu,
  gelu_tanh,
  gelu_erf,
  relu,
  relu2,
  swigluoai,  // gated only: gate * sigmoid(alpha * gate) * (up + 1), both clamped at limit
};

struct activation_spec {
  activation kind = activation::silu;
  bool gated = true;
  float alpha = 1.0f;  // swigluoai
  float limit = 0.0f;  // > 0: gate = min(gate, limit), up = clamp(up, -limit, limit)
};

// Row r of the block is source + index[r] * stride elements.
struct pack_rows_job {
  const void* source;
  dtype type;
  std::size_t stride;
  const std::int32_t* index;  // null: r
  int rows;
  std::size_t k;         // columns of the source
  std::size_t k_padded;  // >= k
  void* packed;
};

// codes[r][0, k_padded) = round(row r * (127 / max)), max = max |row r|, zero beyond k; scale[r] = max / 127. Both are
// zero for max < 2^-100; the scale is NaN where an element is not finite. With a `group`, a multiple of 32, each group
// of k has a scale of its own, behind which are, for each 32 k of the group, the sums of their codes as the kernels
// have them.
struct quantize_rows_job {
  const void* source;
  dtype type;
  std::size_t stride;
  std::size_t rows;
  std::size_t k, k_padded;
  std::int8_t* codes;
  float* scale;
  std::size_t group;  // 0: all of a row
};

// c = rows * panel over k in [k_begin, k_end), both multiples of 128 or the end of K. Of two panels, one after the
// other in memory, c is [2][rows][32].
struct gemm_job {
  const void* panel;
  int panels;  // 1 or 2
  const panel_layout* layout;
  const void* rows_packed;
  int rows;
  std::size_t k_begin, k_end;
  float* c;                // [rows][32]; where k_begin > 0, what the call before it left; whole after k_end == K
  const float* row_scale;  // of quantised rows, as quantize_rows has it
  const void* next;        // the same part of the panel or panels to come, fetched meanwhile; null: nothing
  std::size_t distance;    // how far ahead in the panel itself, bytes
  const void* onward;      // what is fetched so far ahead of it at its end; null: what lies behind it
  std::size_t near;        // 0, or where what `distance` brought as far as the second level comes into the first
  bool widen;              // whether weights of 16 bits are faster as fp32, where many rows share them
};

// c [rows][32] -> columns [column, column + 16 or 32) of the packed block of the next GEMM.
// Gated: c holds 16 gate and 16 up columns.
struct activate_job {
  const float* c;
  int rows;
  const float* bias;  // [32] in panel order, or null
  activation_spec spec;
  bool round_to_bf16;
  std::size_t column;
  std::size_t k;  // padded K of the next GEMM
  void* packed;
};

// sum[index[r]][0..32) += weight[r] * (c[r] + bias)
struct accumulate_job {
  const float* c;
  int rows;
  const float* bias;  // [32] or null
  const float* weight;
  const std::int32_t* index;
  float* sum;
};

struct store_job {
  const float* sum;   // [rows][32]
  const float* bias;  // [32] or null: added
  std::size_t rows;
  int columns;  // valid columns, 1..32
  void* out;    // row r at out + r * stride elements
  dtype type;
  std::size_t stride;
};

// Rows of a block, at most: enough to read a panel from memory once for many products.
constexpr int most_rows = 256;

// How activations lie for a family of formats.
struct row_kernels {
  std::size_t bytes;  // of one element
  void (*pack)(const pack_rows_job&);
  void (*activate)(const activate_job&);
};

struct kernel_table {
  void (*gemm[num_formats])(const gemm_job&);  // null: none here
  row_kernels rows;                            // of formats that do not quantise them
  // int8_dyn, int4_dyn: `pack` copies int8 codes; `activate` writes plain fp32 rows [rows][k], which are quantised when
  // whole.
  row_kernels int8_rows, int4_rows;
  void (*quantize_rows)(const quantize_rows_job&);
  void (*accumulate)(const accumulate_job&);
  void (*store)(const store_job&);
  norm_kernel norm;
  rotary_kernel rotary;
  elementwise_kernel elementwise;
  softmax_kernel softmax;
  attention_kernels attention;
  attention_kernels attention_bf16;  // of queries, keys and values in bf16
  bool rows_in_bf16;                 // `rows` are bf16
  bool tiles;                        // floats are summed in the order of AMX
  // Roofline probes: the exclusive-or of all bytes; `rounds` rounds of independent multiply-adds of the kind that
  // gemm uses for floats and for int8_dyn, returns the operations done.
  std::uint64_t (*read_bytes)(const void* begin, std::size_t bytes);
  double (*arithmetic)(std::size_t rounds);
  double (*int8_arithmetic)(std::size_t rounds);

  const row_kernels& rows_for(format weights) const {
    return weights == format::int8_dyn ? int8_rows : weights == format::int4_dyn ? int4_rows : rows;
  }
};

}  // namespace kt
