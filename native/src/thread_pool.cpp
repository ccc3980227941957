#include <kt/thread_pool.h>
#include <kt/topology.h>

#include <cassert>

namespace kt {
namespace {

// About 50 microseconds: longer than what lies between the phases of one layer.
constexpr int spins = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns when `value` is no longer `old`: a short spin, then a futex.
void wait_while(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

thread_pool::thread_pool(int threads, const std::vector<int>& cpus) {
  assert(cpus.empty() || cpus.size() == static_cast<std::size_t>(threads));
  for (int t = 0; t + 1 < threads; ++t)
    workers_.emplace_back([this, t, cpu = cpus.empty() ? -1 : cpus[t]] {
      pin_thread(cpu);
      work(t);
    });
}

thread_pool::~thread_pool() {
  stop_.store(true, std::memory_order_relaxed);
  run_.fetch_add(1, std::memory_order_release);
  run_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void thread_pool::run(function f, void* context) {
  const auto workers = static_cast<std::uint32_t>(workers_.size());
  function_ = f;
  context_ = context;
  if (workers) {
    running_.store(workers, std::memory_order_relaxed);
    run_.fetch_add(1, std::memory_order_release);
    run_.notify_all();
  }
  f(context, static_cast<int>(workers));
  for (std::uint32_t left; (left = running_.load(std::memory_order_acquire)) != 0;) wait_while(running_, left);
}

void thread_pool::work(int thread) {
  for (std::uint32_t seen = 0;;) {
    wait_while(run_, seen);
    seen = run_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;
    function_(context_, thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

}  // namespace kt
