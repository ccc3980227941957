#include <immintrin.h>

#include "begin.inl"
#include "vec_avx512.h"
#include "kernels.inl"
