// Instruction sets: what this build has, what this machine runs, and which one to use.
#pragma once
#include <cstdint>
#include <kt/kernels.h>
#include <string>
#include <vector>

namespace kt {

using feature_set = std::uint32_t;

namespace feature {
enum : feature_set {
  none = 0,
  avx2 = 1 << 0,    // with FMA and F16C, as on every CPU that has it
  avx512 = 1 << 1,  // F, BW, DQ and VL
  avx512_bf16 = 1 << 2,
  avx512_vnni = 1 << 3,
  avx_vnni = 1 << 4,
  amx_bf16 = 1 << 5,
  amx_int8 = 1 << 6,
  avx512_vbmi = 1 << 7,
};
}  // namespace feature

struct feature_name {
  const char* name;
  feature_set bit;
};
const std::vector<feature_name>& feature_names();

// What CPUID and the operating system report.
feature_set cpu_features();
bool cpu_is_amd();
int cpu_family();  // as the vendor counts; 0: unknown
// Whether this CPU executes the named features although CPUID hides them (a hypervisor may): each is
// tried in a child process. Only features without state of their own can be tried: avx512_bf16.
bool executes(feature_set features);

struct isa {
  const char* name;
  feature_set required;
  const kernel_table* kernels;
  const kernel_table* fallback;  // runs what `kernels` lacks
};

const std::vector<isa>& all_isas();
const isa* find_isa(const std::string& name);  // null: no such name in this build
bool runs_on(const isa& i, feature_set features);
// The table that multiplies rows of this type with weights of this format.
const kernel_table& kernels_for(const isa& i, format weights, dtype rows);
// The best of `all_isas()` for `features`. Where two run the same arithmetic bit for bit, the faster
// by a short measurement on this machine.
const isa& select_isa(feature_set features);

}  // namespace kt
