// A fixed set of threads that run one function together. Between runs they spin for a moment, then sleep.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace kt {

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
  // `f` must not throw. One run at a time.
  template <class F>
  void run(F& f) {
    run([](void* context, int thread) { (*static_cast<F*>(context))(thread); }, &f);
  }

 private:
  using function = void (*)(void*, int);
  void run(function f, void* context);
  void work(int thread);

  std::vector<std::thread> workers_;
  function function_ = nullptr;
  void* context_ = nullptr;
  std::atomic<std::uint32_t> run_{0};      // number of the run; workers wait for it to change
  std::atomic<std::uint32_t> running_{0};  // workers that have not finished it
  std::atomic<bool> stop_{false};
};

}  // namespace kt
