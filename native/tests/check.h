// What all tests share: the instruction sets to test, and `check`.
#pragma once
#include <kt/context.h>
#include <kt/isa.h>

#include <cstddef>
#include <string>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

constexpr kt::dtype dtypes[] = {kt::dtype::f32, kt::dtype::f16, kt::dtype::bf16};

extern bool quick;
extern std::vector<const kt::isa*> isas;  // best first

// Returns `right`; prints a failure, the first few of which end the run.
bool check(bool right, const std::string& what);

// Whether a call throws an E.
template <class E, class F>
bool throws(F f) {
  try {
    f();
  } catch (const E&) {
    return true;
  }
  return false;
}

// The context with `n` threads.
kt::context& threads(int n);

bool is_nan(const char* p, kt::dtype type);

// Place of the first element that differs; a NaN is a NaN, whatever its sign and payload. -1: none.
std::ptrdiff_t first_difference(const char* a, const char* b, std::size_t elements, kt::dtype type);

// Denormals are zero while kernels run, in the tests of single kernels as in context::moe.
struct kernel_mode {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  kernel_mode() { _mm_setcsr(saved | 0x8040); }
  ~kernel_mode() { _mm_setcsr(saved); }
#endif
};

struct test {
  const char* name;
  void (*run)();
};

// Each in a file of its own.
extern const std::vector<test> system_tests, topology_tests, value_tests, linear_tests, layer_tests, attention_tests,
    norm_tests;
