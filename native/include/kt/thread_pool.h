// A fixed set of threads that run one function together. Between runs they spin for a moment, then sleep.
//
// Where the program has an OpenMP runtime whose threads it uses too, theirs are used instead: they spin for a while
// after work of their own, and would have to share their cores with others.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace kt {

// An OpenMP runtime: GOMP_parallel, omp_get_thread_num, omp_get_num_threads, omp_get_max_threads.
struct openmp {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();
  int (*threads)();
  int (*most_threads)();
};

// All pools use its threads from now on; null: none does. It stays with the caller, for as long as the program runs.
void use_openmp(const openmp* runtime);
// Whether pools that the calling thread runs may do so, which is the default.
void use_openmp_here(bool allowed);

class thread_pool {
 public:
  // `cpus`: empty, or for each thread the CPU that it stays on, -1 for any. The last is not heeded: it is the calling
  // thread's, whose affinity belongs to the user.
  explicit thread_pool(int threads, const std::vector<int>& cpus = {});
  ~thread_pool();
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(thread) for thread in [0, size()), the last of them on the calling thread, and waits for all.
  // `f` must not throw, and may not wait for another of its calls. One run at a time.
  template <class F>
  void run(F& f) {
    run([](void* context, int thread) { (*static_cast<F*>(context))(thread); }, &f);
  }

 private:
  using function = void (*)(void*, int);
  void run(function f, void* context);
  void work(int thread);

  bool pinned_;
  std::vector<std::thread> workers_;
  function function_ = nullptr;
  void* context_ = nullptr;
  std::atomic<std::uint32_t> run_{0};      // number of the run; workers wait for it to change
  std::atomic<std::uint32_t> running_{0};  // workers that have not finished it
  std::atomic<bool> stop_{false};
};

}  // namespace kt
