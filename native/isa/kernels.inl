// The kernels and their table. Before it: `vec`, and `dot` for products of int8 codes.
#include "../kernels/gemm.inl"
#include "../kernels/gemm_int8.inl"
#include "../kernels/math.inl"
#include "../kernels/probe.inl"
#include "../kernels/rows.inl"
#include "../kernels/norm.inl"
#include "../kernels/rotary.inl"
#include "../kernels/elementwise.inl"
#include "../kernels/transpose.inl"
#include "../kernels/attention_pack.inl"
#include "../kernels/attention_weights.inl"
#include "../kernels/attention.inl"
#include "../kernels/unpack.inl"
#include "../kernels/gemm_int4.inl"

inline double int8_arithmetic(std::size_t rounds) {
  return arithmetic_chains(rounds, dot::set1(0x01010101), dot::zero(), 8.0 * vec::lanes, [](dot::i32 acc, dot::i32 x) {
    dot::i32 row = x;  // another each time, which meets the same prepared weights
    opaque(row);
    return dot::add(acc, row, dot::prepare(x));
  });
}

template <class Step>
constexpr kernel_table table_of(row_kernels rows, bool rows_in_bf16, double (*probe)(std::size_t),
                                const attention_kernels& bf16 = attention_rounded) {
  kernel_table t{};
  const auto set = [&t](format f, void (*gemm)(const gemm_job&)) { t.gemm[static_cast<int>(f)] = gemm; };
  if (!rows_in_bf16) {
    set(format::f32, each_panel<gemm<fma_step<format::f32>>>);
    set(format::f16, each_panel<gemm_16<format::f16>>);
    set(format::bf16, each_panel<gemm_16<format::bf16>>);
  } else {
    set(format::bf16, each_panel<gemm<Step>>);
  }
  using codes = unpacked_step<Step>;
  set(format::int8, gemm_int8<codes>);
  set(format::int4, gemm_int4<codes>);
  set(format::fp8, gemm_fp8<codes>);
  set(format::mxfp4, gemm_mxfp4<codes>);
  set(format::int8_dyn, each_panel<gemm_int8_dyn<dot, 4>>);
  set(format::int4_dyn, each_panel<gemm_int4_dyn<dot>>);
  t.rows = rows;
  t.int8_rows = {1, pack_int8_rows < int8_block, dot::unsigned_rows ? unsigned_codes : plain_codes >,
                 activate<block<float, 1, 1>>};
  t.int4_rows = {1, pack_int8_rows<int8_block, int4_codes>, activate<block<float, 1, 1>>};
  t.quantize_rows = quantize_rows;
  t.accumulate = accumulate;
  t.store = store;
  t.norm = norm;
  t.rotary = rotary;
  t.elementwise = elementwise;
  t.softmax = softmax;
  t.attention = attention;
  t.attention_bf16 = bf16;
  t.rows_in_bf16 = rows_in_bf16;
  t.read_bytes = read_bytes;
  t.arithmetic = probe;
  t.int8_arithmetic = int8_arithmetic;
  return t;
}
