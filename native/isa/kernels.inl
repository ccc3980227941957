// The kernel table of an instruction set that multiplies in fp32.
#include "../kernels/gemm.inl"
#include "../kernels/math.inl"
#include "../kernels/probe.inl"
#include "../kernels/rows.inl"

double arithmetic(std::size_t rounds) {
  return arithmetic_chains(rounds, vec::set1(0.5f), 2.0 * vec::lanes,
                           [](vec::f32 acc, vec::f32 x) { return vec::fma(x, x, acc); });
}

}  // namespace

const kernel_table kernels = {
    pack_rows<fp32_block>,
    {gemm<fma_step<dtype::f32>>, gemm<fma_step<dtype::f16>>, gemm<fma_step<dtype::bf16>>},
    activate<fp32_block>,
    accumulate,
    store,
    /*rows_in_bf16=*/false,
    read_bytes,
    arithmetic,
};

}  // namespace KT_ISA_NAME
}  // namespace kt
