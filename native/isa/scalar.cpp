#include "begin.inl"
#include "vec_scalar.h"
#include "kernels.inl"
