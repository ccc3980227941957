// Memory that reads as NaN and takes no room until it is written: it stands in for weights that moved elsewhere.
#pragma once
#include <kt/kernels.h>

#include <cstddef>

namespace kt {

// A private mapping of at least `bytes`, every element of it NaN of the type. Throws std::bad_alloc.
void* map_nan(std::size_t bytes, dtype type);
void unmap_nan(void* p, std::size_t bytes);

}  // namespace kt
