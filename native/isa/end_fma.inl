// Closes the namespaces of an instruction set that multiplies in fp32.
double arithmetic(std::size_t rounds) {
  return arithmetic_chains(rounds, vec::set1(0.5f), vec::zero(), 2.0 * vec::lanes,
                           [](vec::f32 acc, vec::f32 x) { return vec::fma(x, x, acc); });
}

}  // namespace

constexpr row_kernels fp32_rows = {4, pack_rows<fp32_block>, activate<fp32_block>};
const kernel_table kernels = table_of<fma_step<format::bf16>>(fp32_rows, /*rows_in_bf16=*/false, arithmetic);

}  // namespace KT_ISA_NAME
}  // namespace kt
