#include <kt/isa.h>

#include <chrono>

namespace kt {

#define KT_ISA(name, features, fallback) \
  namespace name {                       \
  extern const kernel_table kernels;     \
  }
#include <kt/isa.inc>
#undef KT_ISA

const std::vector<isa>& all_isas() {
  static const std::vector<isa> isas = {
#define KT_ISA(name, features, fallback) {#name, features, &name::kernels, &fallback::kernels},
#include <kt/isa.inc>
#undef KT_ISA
  };
  return isas;
}

const isa* find_isa(const std::string& name) {
  for (const isa& i : all_isas())
    if (i.name == name) return &i;
  return nullptr;
}

bool runs_on(const isa& i, feature_set features) { return (i.required & features) == i.required; }

const kernel_table& kernels_for(const isa& i, format weights, dtype rows) {
  const kernel_table& k = *i.kernels;
  // bf16 kernels need rows and weights in bf16; rows that are quantised may have any type.
  const bool runs =
      k.gemm[static_cast<int>(weights)] && (is_dynamic(weights) || !k.rows_in_bf16 || rows == dtype::bf16);
  return runs ? k : *i.fallback;
}

namespace {

// Flops per second of one thread, the best of a few short runs.
double speed(const isa& i) {
  using clock = std::chrono::steady_clock;
  constexpr std::size_t rounds = 8000;
  double best = 0;
  for (int run = 0; run < 6; ++run) {  // the first ones wake the wide units up
    const auto begin = clock::now();
    const double flops = i.kernels->arithmetic(rounds);
    const double rate = flops / std::chrono::duration<double>(clock::now() - begin).count();
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace

const isa& select_isa(feature_set features) {
  const isa* best = nullptr;
  for (const isa& i : all_isas()) {
    if (!runs_on(i, features)) continue;
    if (!best) {
      best = &i;
    } else if (best->kernels->rows_in_bf16 && speed(*best) < speed(i)) {
      // Some CPUs run VDPBF16PS at a quarter of the rate of the fused multiply-adds that it replaces two of.
      best = &i;
    } else {
      break;
    }
  }
  return *best;
}

}  // namespace kt
