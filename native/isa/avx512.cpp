#include <immintrin.h>

#include "begin.inl"
#include "vec_avx512.h"
#include "dot_avx512.h"
#include "kernels.inl"
#include "end_fma.inl"
