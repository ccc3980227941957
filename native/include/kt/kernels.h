// The kernels of one instruction set, as plain functions over plain memory.
//
// Packed weights: columns (output features) in panels of 32; in a panel, rows of the reduction
// dimension K in pairs. bf16: [K/2][32][2], so that one 32-bit lane holds an even and an odd k;
// fp16, fp32: [K][32]. K is even, padding is zero. The layout is the same for every instruction set.
//
// Packed activations: tiles of at most `max_rows` rows, each tile [K][rows] (or [K/2][rows][2] in
// bf16 for dot-product kernels), so that a kernel reads one stream. A block of rows is cut into
// tiles of near-equal size by the kernels themselves.
//
// Order of summation, on every instruction set: pairs of k ascending, in a pair odd before even, one
// fused multiply-add each. It is what VDPBF16PS does, so all kernels give the same bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kt {

enum class dtype : std::uint8_t { f32, f16, bf16 };
constexpr int num_dtypes = 3;
constexpr std::size_t size_of(dtype t) { return t == dtype::f32 ? 4 : 2; }

constexpr int panel_columns = 32;

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

struct pack_rows_job {
  const void* source;  // row r of the block is source + index[r] * stride elements
  dtype type;
  std::size_t stride;
  const std::int32_t* index;
  int rows;
  std::size_t k;         // columns of the source
  std::size_t k_padded;  // even, >= k
  void* packed;
};

struct gemm_job {
  const void* panel;  // one packed panel of weights
  const void* rows_packed;
  int rows;
  std::size_t k;           // padded
  float* c;                // [rows][32]
  const void* next_panel;  // fetched into the cache meanwhile; null: nothing
  std::size_t panel_bytes;
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
  const float* sum;  // [rows][32]
  std::size_t rows;
  int columns;  // valid columns, 1..32
  void* out;    // row r at out + r * stride elements
  dtype type;
  std::size_t stride;
};

struct kernel_table {
  void (*pack_rows)(const pack_rows_job&);
  void (*gemm[num_dtypes])(const gemm_job&);  // by weight format; null: none here
  void (*activate)(const activate_job&);
  void (*accumulate)(const accumulate_job&);
  void (*store)(const store_job&);
  bool rows_in_bf16;  // packed activations are bf16 pairs
  // Roofline probes: the exclusive-or of all bytes; `rounds` rounds of independent multiply-adds of
  // the kind that gemm uses, returns the flops done.
  std::uint64_t (*read_bytes)(const void* begin, std::size_t bytes);
  double (*arithmetic)(std::size_t rounds);
};

}  // namespace kt
