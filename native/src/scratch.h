// What the forward passes share: memory between calls, the order of work.
#pragma once
#include <kt/context.h>

#include <atomic>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "block_gemm.h"

namespace kt {

struct thread_scratch {
  buffer rows, c, scale, sum;
  buffer attention;  // queries, a packed tile, scores, states of a split and of all
};

struct slice_scratch {
  buffer hidden, plain, scale, partial;
};

struct context_scratch {
  std::vector<thread_scratch> threads;
  std::vector<slice_scratch> slices;
  buffer rows;   // of the input: packed (linear), quantised (dynamic formats)
  buffer scale;  // dynamic formats: of each of them
  buffer probe;
  buffer attention;                 // states of splits and of blocks of rows that threads share
  std::vector<std::size_t> counts;  // of tokens, by expert; zero between calls
};

struct context::scratch : context_scratch {};

// Denormals are zero while kernels run, as VDPBF16PS has it.
class denormals_are_zero {
#if defined(__SSE__)
 public:
  denormals_are_zero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~denormals_are_zero() { _mm_setcsr(saved_); }
  denormals_are_zero(const denormals_are_zero&) = delete;
  denormals_are_zero& operator=(const denormals_are_zero&) = delete;

 private:
  unsigned saved_;
#endif
};

// Hands out [0, size) in order; each thread may know its next item before it starts the present one.
class queue {
 public:
  explicit queue(std::size_t size = 0) : size_(size) {}
  queue(queue&& other) noexcept : size_(other.size_) {}
  queue& operator=(queue&& other) noexcept {
    size_ = other.size_;
    next_.store(0, std::memory_order_relaxed);
    return *this;
  }
  std::size_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  bool has(std::size_t i) const { return i < size_; }

 private:
  std::size_t size_;
  std::atomic<std::size_t> next_{0};
};

}  // namespace kt
