// Opens the namespaces of one instruction set. Everything but the kernel table is local to its
// object file: the linker must not merge code compiled for different CPUs.
#include <kt/kernels.h>

#include <type_traits>
#define KT_UNROLLED(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
namespace kt {
namespace KT_ISA_NAME {
extern const kernel_table kernels;
namespace {
#include "../kernels/float_bits.inl"
