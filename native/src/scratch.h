// What the forward passes share: memory between calls, the order of work.
#pragma once
#include <kt/context.h>

#include <atomic>
#include <cstdint>
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

// Hands out [0, size): to all threads in order, or to each of `shares` threads its own part in order, whose items
// follow one another in memory, and the last items of others' when that is done. Each thread may know its next item
// before it starts the present one.
class queue {
 public:
  explicit queue(std::size_t size = 0, int shares = 1) : size_(size), left_(static_cast<std::size_t>(shares)) {
    const std::size_t n = left_.size();
    for (std::size_t s = 0; s < n; ++s) left_[s].range = joined(size * s / n, size * (s + 1) / n);
  }
  // An item that `has` denies: nothing is left.
  std::size_t take(int thread = 0) {
    const std::size_t own = static_cast<std::size_t>(thread) % left_.size();
    for (std::size_t i = 0; i < left_.size(); ++i) {
      std::atomic<std::uint64_t>& range = left_[(own + i) % left_.size()].range;
      std::uint64_t now = range.load(std::memory_order_relaxed);
      for (std::size_t begin, end; (begin = now >> 32) < (end = now & 0xffffffff);)
        if (range.compare_exchange_weak(now, i ? joined(begin, end - 1) : joined(begin + 1, end),
                                        std::memory_order_relaxed))
          return i ? end - 1 : begin;
    }
    return size_;
  }
  bool has(std::size_t i) const { return i < size_; }

 private:
  struct alignas(64) part {
    std::atomic<std::uint64_t> range;
  };
  static std::uint64_t joined(std::size_t begin, std::size_t end) { return std::uint64_t{begin} << 32 | end; }

  std::size_t size_;
  std::vector<part> left_;
};

}  // namespace kt
