#include <kt/context.h>

#include <algorithm>
#include <chrono>

#include "scratch.h"

namespace kt {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::vector<int> cpus_of(const std::vector<thread_place>& places) {
  std::vector<int> cpus;
  for (const thread_place& p : places) cpus.push_back(p.cpu);
  return cpus;
}

}  // namespace

context::context(int threads) : context(std::vector<thread_place>(std::max(threads, 1))) {}

context::context(const std::vector<thread_place>& threads)
    : places_(threads),
      pool_(static_cast<int>(threads.size()), cpus_of(threads)),
      scratch_(std::make_unique<scratch>()) {
  scratch_->threads.resize(pool_.size());
}

context::~context() = default;

int context::threads() const { return pool_.size(); }

double context::read_bandwidth(const kernel_table& kernels, std::size_t bytes, int repeats) {
  const std::lock_guard lock(turn_);
  const std::size_t threads = pool_.size(), share = bytes / threads / 4096 * 4096;
  buffer& memory = scratch_->probe;
  if (memory.bytes() < share * threads) {
    memory.reserve(share * threads);
    auto touch = [&](int t) {
      for (std::size_t i = 0; i < share; i += 64) memory.as<char>(t * share)[i] = 1;
    };
    pool_.run(touch);
  }
  std::vector<std::uint64_t> sums(threads * 8);
  auto read = [&](int t) { sums[t * 8] += kernels.read_bytes(memory.as<char>(t * share), share); };
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const double begin = seconds();
    pool_.run(read);
    best = std::min(best, seconds() - begin);
  }
  return static_cast<double>(share * threads) / best;
}

double context::arithmetic(const kernel_table& kernels, bool int8, double length) {
  const std::lock_guard lock(turn_);
  double (*const probe)(std::size_t) = int8 ? kernels.int8_arithmetic : kernels.arithmetic;
  std::vector<double> rates(pool_.size() * 8);
  auto run = [&](int t) {
    const double begin = seconds();
    double done = 0, now = begin;
    for (; now < begin + length; now = seconds()) done += probe(20'000);
    rates[t * 8] = done / (now - begin);
  };
  pool_.run(run);
  double total = 0;
  for (double r : rates) total += r;
  return total;
}

}  // namespace kt
