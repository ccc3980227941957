// NUMA nodes, and which of their CPUs the threads of a pool get.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kt {

struct numa_node {
  int id = -1;            // the kernel's number; -1: unknown, and memory is left to the kernel
  std::vector<int> cpus;  // one of each physical core, ascending, then the second threads of the cores, ...
  int cores = 0;          // cpus [0, cores) are of different physical cores
};

// At least one node, ascending by id. A CPU is in one node at most.
struct topology {
  std::vector<numa_node> nodes;
};

// The CPUs that the calling thread may run on, ascending; none where the kernel does not say.
std::vector<int> allowed_cpus();

// The nodes that have memory, with those of their CPUs that are allowed and online. CPUs of a node without memory count
// to the nearest node that has some; a node without such CPUs is left out. Where `sys_root` does not say, or
// contradicts itself: one node, of unknown id, with all CPUs.
topology read_topology(const std::string& sys_root = "/sys", std::vector<int> allowed = allowed_cpus());

// Threads [begin, end).
struct team {
  int begin = 0, end = 0;
};

struct placement {
  std::vector<int> node;    // of each thread: index into topology::nodes; ascending
  std::vector<int> cpu;     // of each thread; -1: any
  std::vector<team> teams;  // of each node; never empty. With fewer threads than nodes, several nodes share a thread.
};

// Spreads `threads` >= 1 threads over the nodes in proportion to their physical cores, at least one to each while there
// are enough, on different CPUs. No CPU is chosen on a machine of one node, nor for more threads than CPUs.
placement assign(const topology& topology, int threads);

// Keeps the calling thread on `cpu`. Does nothing if it may not run there: that costs speed alone.
void pin_thread(int cpu);

// The numbers in a list as Linux writes it, "0-3,8,10-11", ascending; nothing if it is malformed.
std::optional<std::vector<int>> parse_cpu_list(std::string_view text);

}  // namespace kt
