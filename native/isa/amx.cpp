// AMX: bf16 and int8 on tiles, all else on AVX-512. Tile instructions are written in assembly and need no flags.
#include <immintrin.h>

#include "begin.inl"
#include "vec_avx512.h"
#include "dot_avx512.h"
#include "kernels.inl"
#include "tile_hw.h"
#include "../kernels/gemm_amx.inl"
#include "../kernels/attention_bf16.inl"
#include "../kernels/attention_amx.inl"
#include "../kernels/unpack_amx.inl"

}  // namespace

const kernel_table kernels = tile_table();

}  // namespace KT_ISA_NAME
}  // namespace kt
