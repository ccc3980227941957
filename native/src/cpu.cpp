#include <kt/isa.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace kt {

const std::vector<feature_name>& feature_names() {
  static const std::vector<feature_name> names = {
      {"avx2", feature::avx2},
      {"avx512", feature::avx512},
      {"avx512_bf16", feature::avx512_bf16},
      {"avx512_vnni", feature::avx512_vnni},
      {"avx512_vbmi", feature::avx512_vbmi},
      {"avx_vnni", feature::avx_vnni},
      {"amx_bf16", feature::amx_bf16},
      {"amx_int8", feature::amx_int8},
  };
  return names;
}

#if defined(__x86_64__)

namespace {

struct registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

registers cpuid(unsigned leaf, unsigned subleaf) {
  registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned value, int n) { return value >> n & 1u; }

// Which register states the operating system saves (XCR0).
std::uint64_t saved_states() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

// Linux hands out tile state only to a process that asks for it, before its threads start.
bool tile_permission() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

feature_set detect() {
  const registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const std::uint64_t saved = saved_states();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
  feature_set f = feature::none;
  if (ymm && bit(seven.ebx, 5) && bit(one.ecx, 12) && bit(one.ecx, 29)) {  // AVX2, FMA, F16C
    f |= feature::avx2;
    if (bit(seven_one.eax, 4)) f |= feature::avx_vnni;
    if (zmm && bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31)) {
      f |= feature::avx512;
      if (bit(seven.ecx, 1)) f |= feature::avx512_vbmi;
      if (bit(seven.ecx, 11)) f |= feature::avx512_vnni;
      if (bit(seven_one.eax, 5)) f |= feature::avx512_bf16;
    }
  }
  if (tiles && bit(seven.edx, 24) && tile_permission()) {
    if (bit(seven.edx, 22)) f |= feature::amx_bf16;
    if (bit(seven.edx, 25)) f |= feature::amx_int8;
  }
  return f;
}

}  // namespace

feature_set cpu_features() {
  static const feature_set features = detect();
  return features;
}

bool cpu_is_amd() {
  const registers zero = cpuid(0, 0);
  return zero.ebx == 0x68747541 && zero.edx == 0x69746e65 && zero.ecx == 0x444d4163;  // "AuthenticAMD"
}

int cpu_family() {
  const std::uint32_t one = cpuid(1, 0).eax, base = one >> 8 & 15;
  return static_cast<int>(base == 15 ? base + (one >> 20 & 255) : base);
}

bool executes(feature_set features) {
  features &= ~cpu_features();
  if (!features) return true;
  // Its registers must be saved by the system already, or a trial would prove nothing.
  if (features != feature::avx512_bf16 || !(cpu_features() & feature::avx512)) return false;
  const pid_t child = fork();
  if (child < 0) return false;
  if (child == 0) {
    asm volatile(".byte 0x62, 0xf2, 0x7e, 0x48, 0x52, 0xc0" : : : "xmm0");  // vdpbf16ps zmm0, zmm0, zmm0
    _exit(0);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

#else

feature_set cpu_features() { return feature::none; }
bool cpu_is_amd() { return false; }
int cpu_family() { return 0; }
bool executes(feature_set features) { return !features; }

#endif

}  // namespace kt
