#include <immintrin.h>

#include "begin.inl"
#include "vec_avx2.h"
#include "dot_avx2.h"
#include "kernels.inl"
#include "end_fma.inl"
