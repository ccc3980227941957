#include <kt/thread_pool.h>
#include <kt/topology.h>

#include <algorithm>
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

std::atomic<const openmp*> runtime{nullptr};
thread_local bool allowed_here = true;

// The runtime, if a team of its threads for the calling thread has this size. Another one would be made anew, and made
// anew again for the next work of others.
const openmp* runtime_for(int threads) {
  const openmp* r = runtime.load(std::memory_order_acquire);
  return r && allowed_here && r->most_threads() == threads ? r : nullptr;
}

struct team_run {
  const openmp* runtime;
  void (*function)(void*, int);
  void* context;
  int size;
};

// The calling thread is the first of a team and the last of a pool. A team can be smaller than what was asked for.
void run_in_team(void* data) {
  const team_run& run = *static_cast<team_run*>(data);
  const int step = run.runtime->threads();
  for (int t = run.runtime->thread(); t < run.size; t += step) run.function(run.context, (t + run.size - 1) % run.size);
}

}  // namespace

void use_openmp(const openmp* r) { runtime.store(r, std::memory_order_release); }
void use_openmp_here(bool allowed) { allowed_here = allowed; }

thread_pool::thread_pool(int threads, const std::vector<int>& cpus)
    : pinned_(std::any_of(cpus.begin(), cpus.end(), [](int cpu) { return cpu >= 0; })) {
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
  if (const openmp* r = workers && !pinned_ ? runtime_for(size()) : nullptr) {
    team_run all{r, f, context, size()};
    r->parallel(run_in_team, &all, static_cast<unsigned>(all.size), 0);
    return;
  }
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
