#include <kt/moe.h>

#include <algorithm>
#include <chrono>
#include <vector>

namespace kt {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class F>
double best_time(thread_pool& pool, int repeats, F& work) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const double begin = seconds();
    pool.run(work);
    best = std::min(best, seconds() - begin);
  }
  return best;
}

}  // namespace

double context::read_bandwidth(const kernel_table& kernels, std::size_t bytes, int repeats) {
  const std::lock_guard lock(turn_);
  const std::size_t threads = pool_.size(), share = bytes / threads / 4096 * 4096;
  buffer memory(share * threads);
  std::vector<std::uint64_t> sums(threads * 8);
  auto touch = [&](int t) {
    for (std::size_t i = 0; i < share; i += 64) memory.as<char>(t * share)[i] = 1;
  };
  pool_.run(touch);
  auto read = [&](int t) { sums[t * 8] += kernels.read_bytes(memory.as<char>(t * share), share); };
  return static_cast<double>(share * threads) / best_time(pool_, repeats, read);
}

double context::arithmetic(const kernel_table& kernels, int repeats) {
  const std::lock_guard lock(turn_);
  std::vector<double> flops(pool_.size() * 8);
  auto run = [&](int t) { flops[t * 8] = kernels.arithmetic(2'000'000); };
  const double best = best_time(pool_, repeats, run);
  double total = 0;
  for (double f : flops) total += f;
  return total / best;
}

}  // namespace kt
