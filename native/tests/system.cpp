// Threads, memory, and the choice of an instruction set.
#include <kt/buffer.h>
#include <kt/nan_memory.h>
#include <kt/thread_pool.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "../src/scratch.h"
#include "check.h"
#include "weights.h"

namespace {

using kt::dtype;

void test_thread_pool() {
  for (int size : {1, 2, 5}) {
    kt::thread_pool pool(size);
    check(pool.size() == size, "thread_pool::size");
    std::vector<long> count(size * 16);
    auto add = [&](int thread) { ++count[thread * 16]; };
    const int runs = quick ? 100 : 3000;
    for (int i = 0; i < runs; ++i) pool.run(add);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // long enough to fall asleep
    pool.run(add);
    for (int t = 0; t < size; ++t) check(count[t * 16] == runs + 1, "each thread takes part in each run");
  }
  for (int i = 0; i < 20; ++i) kt::thread_pool idle(3);
}

void test_queue() {
  for (int shares : {1, 2, 3})
    for (std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{7}, std::size_t{1000}}) {
      kt::queue alone(size, shares), shared(size, shares);
      std::vector<std::size_t> order;
      for (std::size_t i; alone.has(i = alone.take(1));) order.push_back(i);
      const std::size_t own = 1 % shares, begin = size * own / shares, end = size * (own + 1) / shares;
      bool right = order.size() == size && !alone.has(alone.take(0));
      for (std::size_t i = 0; right && i < end - begin; ++i) right = order[i] == begin + i;
      check(right, "a thread takes its own part of a queue first, in order");
      if (shares == 2 && begin) check(order[end - begin] == begin - 1, "then the last item of another's");
      std::vector<int> taken(size);
      kt::thread_pool pool(3);
      auto take_all = [&](int thread) {
        for (std::size_t i; shared.has(i = shared.take(thread));) __atomic_fetch_add(&taken[i], 1, __ATOMIC_RELAXED);
      };
      pool.run(take_all);
      check(std::count(taken.begin(), taken.end(), 1) == static_cast<std::ptrdiff_t>(size),
            "each item of a queue is taken once");
    }
}

// A runtime whose teams have at most two threads.
thread_local int team_thread = 0, team_threads = 1;
int teams = 0;
const kt::openmp two_threads{[](void (*function)(void*), void* data, unsigned threads, unsigned) {
                               ++teams;
                               const int size = std::min(threads, 2u);
                               const auto work = [&](int thread) {
                                 team_thread = thread;
                                 team_threads = size;
                                 function(data);
                                 team_thread = 0;
                                 team_threads = 1;
                               };
                               std::thread other([&] { work(1); });
                               work(0);
                               other.join();
                             },
                             [] { return team_thread; }, [] { return team_threads; }, [] { return 5; }};

void test_openmp() {
  kt::thread_pool pool(5), small(2), pinned(5, {-1, -1, -1, 0, -1});
  std::vector<long> count(5 * 16);
  std::thread::id last;
  auto add = [&](int thread) {
    ++count[thread * 16];
    if (thread == 4) last = std::this_thread::get_id();
  };
  const auto all_ran = [&](long runs) {
    bool all = true;
    for (int t = 0; t < 5; ++t) all = all && count[t * 16] == runs;
    return all && last == std::this_thread::get_id();
  };
  kt::use_openmp(&two_threads);
  pool.run(add);
  check(teams == 1 && all_ran(1), "a smaller team does all of the work");
  pinned.run(add);
  check(teams == 1 && all_ran(2), "threads that are pinned do their own work");
  kt::use_openmp_here(false);
  pool.run(add);
  check(teams == 1 && all_ran(3), "a thread may do without a team");
  kt::use_openmp_here(true);
  auto nothing = [](int) {};
  small.run(nothing);
  check(teams == 1, "a team of another size is not made");
  kt::use_openmp(nullptr);
  pool.run(add);
  check(teams == 1 && all_ran(4), "without a runtime");
}

void test_memory() {
  for (std::size_t bytes : {1, 5000, 2 << 20, (4 << 20) + 1}) {
    kt::buffer b(bytes);
    check(b.bytes() >= bytes && b.as()[0] == 0 && b.as()[bytes - 1] == 0, "a buffer is zero");
    check(bytes < (2u << 20) || reinterpret_cast<std::uintptr_t>(b.as()) % (2u << 20) == 0, "on a huge page");
    b.as()[bytes - 1] = 1;
    kt::buffer other = std::move(b);
    check(!b.as() && other.as()[bytes - 1] == 1, "a buffer moves");
  }
  for (dtype type : dtypes) {
    const std::size_t bytes = (std::size_t{33} << 20) + 6;
    auto* p = static_cast<char*>(kt::map_nan(bytes, type));
    bool all = true;
    for (std::size_t at = 0; at + 4 <= bytes; at += 4092) all = all && is_nan(p + at, type);
    check(all, std::string("map_nan reads as NaN of ") + name_of(type));
    std::memset(p, 0, 4096);
    check(is_nan(p + (16 << 20), type), "a write to map_nan shows in one place only");
    kt::unmap_nan(p, bytes);
  }
}

void test_dispatch() {
  check(std::string(kt::select_isa(kt::feature::none).name) == "scalar", "without features: scalar");
  check(!kt::find_isa("no such name") && kt::find_isa("scalar"), "find_isa");
  const kt::isa& chosen = kt::select_isa(kt::cpu_features());
  check(kt::runs_on(chosen, kt::cpu_features()), "the chosen ISA runs here");
  for (const kt::isa& i : kt::all_isas()) {
    check(kt::find_isa(i.name) == &i, std::string("find_isa ") + i.name);
    check(i.required == 0 || !kt::runs_on(i, kt::feature::none), std::string(i.name) + " needs its features");
    const std::vector<kt::isa>& all = kt::all_isas();
    const bool listed = std::any_of(all.begin(), all.end(), [&](const kt::isa& o) {
      return o.kernels == i.fallback && (o.required & i.required) == o.required;
    });
    check(listed, std::string(i.name) + " has a fallback that runs where it runs");
    for (const kt::weight_format& f : all_formats())
      for (dtype rows : dtypes) {
        const kt::kernel_table& k = kt::kernels_for(i, f.kind, rows);
        check(k.gemm[static_cast<int>(f.kind)] && (is_dynamic(f.kind) || !k.rows_in_bf16 || rows == dtype::bf16),
              std::string(i.name) + " multiplies " + name_of(rows) + " rows with " + name_of(f));
      }
    for (const kt::weight_format& f : quantized_formats())
      check(&kt::kernels_for(i, f.kind, dtype::bf16) == i.kernels, std::string(i.name) + " has " + name_of(f));
  }
  check(kt::executes(kt::cpu_features()), "this CPU executes what it reports");
  check(!kt::executes(kt::feature::amx_int8 & ~kt::cpu_features()) || kt::cpu_features() & kt::feature::amx_int8 ||
            (kt::feature::amx_int8 & ~kt::cpu_features()) == 0,
        "tiles cannot be tried");
}

void test_probes() {
  if (quick) return;
  for (const kt::isa* i : isas) {
    check(threads(2).read_bandwidth(*i->kernels, 4 << 20, 1) > 1e6, std::string("read_bandwidth of ") + i->name);
    check(i->kernels->arithmetic(1000) > 0, std::string("arithmetic of ") + i->name);
    check(i->kernels->int8_arithmetic(1000) > 0, std::string("int8_arithmetic of ") + i->name);
    const std::vector<char> some(1 << 12, 0x5a);
    std::vector<char> odd = some;
    odd[7] = 0;
    check(i->kernels->read_bytes(some.data(), some.size()) != i->kernels->read_bytes(odd.data(), odd.size()),
          std::string("read_bytes reads, ") + i->name);
  }
}

}  // namespace

const std::vector<test> system_tests = {
    {"dispatch", test_dispatch}, {"memory", test_memory}, {"thread pool", test_thread_pool},
    {"queue", test_queue},       {"OpenMP", test_openmp}, {"probes", test_probes},
};
