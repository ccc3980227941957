// Tests of the native code without Python: native_tests [--quick] [--isa NAME]... [+avx512_bf16]
//
// --quick: fewer cases, for valgrind. --isa: only these instruction sets. +avx512_bf16: also where CPUID hides it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "check.h"
#include "floats.h"

bool quick = false;
std::vector<const kt::isa*> isas;

namespace {

constexpr int most_failures = 5;
int failures = 0, checks = 0;

}  // namespace

bool check(bool right, const std::string& what) {
  ++checks;
  if (right) return true;
  std::printf("FAILED: %s\n", what.c_str());
  if (++failures >= most_failures) {
    std::printf("%d failures, stopping\n", failures);
    std::exit(1);
  }
  return false;
}

kt::context& threads(int n) {
  static std::map<int, kt::context> contexts;
  return contexts.try_emplace(n, n).first->second;
}

bool is_nan(const char* p, kt::dtype type) { return std::isnan(floats::load(p, type, 0)); }

std::ptrdiff_t first_difference(const char* a, const char* b, std::size_t elements, kt::dtype type) {
  const std::size_t size = size_of(type);
  for (std::size_t i = 0; i < elements; ++i, a += size, b += size)
    if (std::memcmp(a, b, size) != 0 && !(is_nan(a, type) && is_nan(b, type))) return static_cast<std::ptrdiff_t>(i);
  return -1;
}

namespace {

void timed(const test& t) {
  const auto begin = std::chrono::steady_clock::now();
  const int checked = checks, failed = failures;
  t.run();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%-26s %8d checks %6.2f s%s\n", t.name, checks - checked, seconds, failures > failed ? "  FAILED" : "");
  std::fflush(stdout);
}

int usage(const char* argument) {
  std::printf("%s\nusage: native_tests [--quick] [--isa NAME]... [+avx512_bf16]\n", argument);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  kt::feature_set features = kt::cpu_features();
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--quick") {
      quick = true;
    } else if (a == "--isa" && i + 1 < argc) {
      wanted.emplace_back(argv[++i]);
    } else if (a == "+avx512_bf16") {
      if (!kt::executes(kt::feature::avx512_bf16)) return usage("this CPU does not execute avx512_bf16");
      features |= kt::feature::avx512_bf16;
    } else {
      return usage(argv[i]);
    }
  }
  for (const kt::isa& i : kt::all_isas())
    if (kt::runs_on(i, features) && (wanted.empty() || std::count(wanted.begin(), wanted.end(), i.name)))
      isas.push_back(&i);
  if (isas.empty() || (!wanted.empty() && isas.size() != wanted.size())) return usage("an ISA does not run here");
  for (const kt::isa* i : isas) std::printf("ISA %s\n", i->name);
  for (const std::vector<test>* tests :
       {&system_tests, &topology_tests, &value_tests, &linear_tests, &layer_tests, &attention_tests, &norm_tests})
    for (const test& t : *tests) timed(t);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
