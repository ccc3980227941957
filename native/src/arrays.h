// Views of the arrays of a program: other shapes of the same memory, and copies between them.
#pragma once
#include <kt/context.h>
#include <kt/program.h>

#include <cstdint>
#include <string>
#include <vector>

namespace kt {

// Throws std::invalid_argument.
[[noreturn]] void fail_program(const std::string& what);

dtype float_type(const array& a);
int dimension(const array& a, std::int64_t d, int extra = 0);
void set_contiguous(array& a);
array without(const array& a, int d);
array selected(const array& a, int d, std::int64_t index);
array sliced(const array& a, int d, std::int64_t begin, std::int64_t end);
// As often along dimensions of 1 as a shape says, without moving anything.
array expanded(const array& a, const std::int64_t* shape, int rank);
// The shape of an operation on both, in `shape`; returns its rank.
int broadcast(const array& a, const array& b, std::int64_t* shape);
// Gives `a` another shape without moving anything; returns whether that can be.
bool view(array& a, const std::vector<std::int64_t>& shape);
// The rows of the last dimension `stride` elements apart.
bool as_rows(const array& a, std::int64_t& stride);
std::int64_t rows_of(const array& a);
// Elements of `from` to those of `to`, which has the same shape.
void copy(context& c, array from, array to);

}  // namespace kt
