// The kernels of AMX on emulated tiles, for any CPU: to test them where there is no AMX. Never chosen by itself.
#include <cstdio>
#include <cstdlib>

#include "begin.inl"
#include "vec_scalar.h"
#include "dot_scalar.h"
#include "kernels.inl"
#include "tile_emu.h"
#include "../kernels/gemm_amx.inl"
#include "../kernels/attention_bf16.inl"
#include "../kernels/attention_amx.inl"
#include "../kernels/unpack_amx.inl"

}  // namespace

const kernel_table kernels = tile_table();

}  // namespace KT_ISA_NAME
}  // namespace kt
