#include <kt/topology.h>

#include <sched.h>

#include <algorithm>
#include <cassert>
#include <charconv>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>

namespace kt {
namespace {

constexpr int max_cpus = 8192;  // the most that Linux can be built for

// One cpu_set_t ends at 1024 CPUs, and the kernel refuses a set that is shorter than its own.
using cpu_bits = cpu_set_t[max_cpus / CPU_SETSIZE];

using cpus_of_nodes = std::map<int, std::vector<int>>;

std::optional<cpus_of_nodes> read_nodes(const std::string& sys_root, const std::vector<int>& usable);
numa_node cores_first(const std::string& sys_root, int id, const std::vector<int>& cpus);
std::optional<std::vector<int>> read_list(const std::string& path);
std::vector<int> shares(const std::vector<numa_node>& nodes, int threads);

bool contains(const std::vector<int>& ascending, int value) {
  return std::binary_search(ascending.begin(), ascending.end(), value);
}

std::vector<int> common(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return both;
}

int count_cpus(const std::vector<numa_node>& nodes) {
  return std::accumulate(nodes.begin(), nodes.end(), 0,
                         [](int sum, const numa_node& n) { return sum + static_cast<int>(n.cpus.size()); });
}

}  // namespace

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_bits bits = {};
  if (sched_getaffinity(0, sizeof bits, bits) != 0) return cpus;
  for (int cpu = 0; cpu < max_cpus; ++cpu)
    if (CPU_ISSET_S(cpu, sizeof bits, bits)) cpus.push_back(cpu);
  return cpus;
}

topology read_topology(const std::string& sys_root, std::vector<int> allowed) {
  std::sort(allowed.begin(), allowed.end());
  allowed.erase(std::unique(allowed.begin(), allowed.end()), allowed.end());
  if (const auto online = read_list(sys_root + "/devices/system/cpu/online")) {
    std::vector<int> usable = common(allowed, *online);
    if (!usable.empty()) allowed = std::move(usable);
  }
  topology result;
  if (const auto nodes = read_nodes(sys_root, allowed))
    for (const auto& [id, cpus] : *nodes) result.nodes.push_back(cores_first(sys_root, id, cpus));
  if (result.nodes.empty()) result.nodes.push_back(cores_first(sys_root, -1, allowed));
  return result;
}

placement assign(const topology& topology, int threads) {
  assert(threads >= 1 && !topology.nodes.empty());
  const std::vector<numa_node>& nodes = topology.nodes;
  const int n = static_cast<int>(nodes.size());
  placement p;
  if (threads < n) {
    for (int i = 0; i < n; ++i) p.teams.push_back({i * threads / n, i * threads / n + 1});
  } else {
    int begin = 0;
    for (int share : shares(nodes, threads)) {
      p.teams.push_back({begin, begin + share});
      begin += share;
    }
  }
  // On one node all memory is equally far. A pinned thread would gain nothing, and would have to wait when another
  // process, or another pool, is on its CPU; the kernel moves a thread that is free to go.
  const bool pinned = n > 1 && threads <= count_cpus(nodes);
  p.node.resize(threads);
  p.cpu.assign(threads, -1);
  // Descending: a thread that several nodes share is at home in the first of them.
  for (int i = n; i-- > 0;)
    for (int t = p.teams[i].begin; t < p.teams[i].end; ++t) {
      p.node[t] = i;
      if (pinned) p.cpu[t] = nodes[i].cpus[t - p.teams[i].begin];
    }
  return p;
}

void pin_thread(int cpu) {
  if (cpu < 0 || cpu >= max_cpus) return;
  cpu_bits bits = {};
  CPU_SET_S(cpu, sizeof bits, bits);
  sched_setaffinity(0, sizeof bits, bits);
}

std::optional<std::vector<int>> parse_cpu_list(std::string_view text) {
  const auto take = [&](char c) {
    const bool there = text.starts_with(c);
    if (there) text.remove_prefix(1);
    return there;
  };
  const auto take_number = [&](int& value) {
    unsigned number;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || number >= max_cpus) return false;
    text.remove_prefix(end - text.data());
    value = static_cast<int>(number);
    return true;
  };
  if (text.ends_with('\n')) text.remove_suffix(1);
  std::vector<int> numbers;
  if (text.empty()) return numbers;
  do {
    int first, last;
    if (!take_number(first)) return std::nullopt;
    last = first;
    if (take('-') && !take_number(last)) return std::nullopt;
    // The kernel writes ascending lists; to insist on it also bounds the length of what garbage can ask for.
    if (last < first || (!numbers.empty() && first <= numbers.back())) return std::nullopt;
    while (first <= last) numbers.push_back(first++);
  } while (take(','));
  if (!text.empty()) return std::nullopt;
  return numbers;
}

namespace {

std::string node_path(const std::string& sys_root, int node) {
  return sys_root + "/devices/system/node/node" + std::to_string(node);
}

// The node of `with_memory` that is nearest to `node`; the first of them if the kernel does not say.
int nearest(const std::string& sys_root, int node, const std::vector<int>& online,
            const std::vector<int>& with_memory) {
  // One distance for each node that is online, in their order.
  std::ifstream file(node_path(sys_root, node) + "/distance");
  int best = with_memory.front(), least = std::numeric_limits<int>::max(), distance;
  for (int other : online) {
    if (!(file >> distance)) return with_memory.front();
    if (distance < least && contains(with_memory, other)) {
      least = distance;
      best = other;
    }
  }
  return best;
}

// The `usable` CPUs of each node with memory; nothing unless each CPU is in one node.
std::optional<cpus_of_nodes> read_nodes(const std::string& sys_root, const std::vector<int>& usable) {
  const std::string root = sys_root + "/devices/system/node/";
  const auto online = read_list(root + "online");
  auto with_memory = read_list(root + "has_memory");
  if (!with_memory) with_memory = read_list(root + "has_normal_memory");  // before Linux 3.8
  if (!online || !with_memory) return std::nullopt;
  const std::vector<int> homes = common(*online, *with_memory);
  if (homes.empty()) return std::nullopt;

  cpus_of_nodes nodes;
  std::vector<int> seen;
  for (int node : *online) {
    const auto listed = read_list(node_path(sys_root, node) + "/cpulist");
    if (!listed) return std::nullopt;
    const std::vector<int> cpus = common(*listed, usable);
    if (cpus.empty()) continue;
    std::vector<int>& home = nodes[contains(homes, node) ? node : nearest(sys_root, node, *online, homes)];
    home.insert(home.end(), cpus.begin(), cpus.end());
    seen.insert(seen.end(), cpus.begin(), cpus.end());
  }
  std::sort(seen.begin(), seen.end());
  if (seen != usable) return std::nullopt;
  for (auto& [id, cpus] : nodes) std::sort(cpus.begin(), cpus.end());
  return nodes;
}

// `cpus` are ascending. A CPU of which no siblings are known is a core.
numa_node cores_first(const std::string& sys_root, int id, const std::vector<int>& cpus) {
  struct ranked {
    std::ptrdiff_t earlier;  // CPUs of this node and of the same core with lower numbers
    int cpu;
  };
  std::vector<ranked> order;
  for (int cpu : cpus) {
    const auto path = sys_root + "/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
    const std::vector<int> siblings = read_list(path).value_or(std::vector<int>());
    order.push_back({std::count_if(siblings.begin(), siblings.end(),
                                   [&](int other) { return other < cpu && contains(cpus, other); }),
                     cpu});
  }
  std::stable_sort(order.begin(), order.end(), [](const ranked& a, const ranked& b) { return a.earlier < b.earlier; });
  numa_node node;
  node.id = id;
  for (const ranked& r : order) {
    node.cpus.push_back(r.cpu);
    node.cores += r.earlier == 0;
  }
  return node;
}

// Nothing if the file is missing or malformed.
std::optional<std::vector<int>> read_list(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return parse_cpu_list(line);
}

// Threads for each node, at least one; `threads` >= nodes.
std::vector<int> shares(const std::vector<numa_node>& nodes, int threads) {
  const std::size_t n = nodes.size();
  // Cores of one node may run out before those of another have one thread each: up to the number of CPUs, no CPU
  // gets two threads.
  const bool one_each = threads <= count_cpus(nodes);
  std::vector<int> given(n, 1);
  for (int left = threads - static_cast<int>(n); left > 0; --left) {
    // The next thread goes to where, with it, there are the fewest threads per core.
    std::size_t best = n;
    for (std::size_t i = 0; i < n; ++i) {
      if (one_each && given[i] == static_cast<int>(nodes[i].cpus.size())) continue;
      if (best == n ||
          (given[i] + 1) * std::max(1, nodes[best].cores) < (given[best] + 1) * std::max(1, nodes[i].cores))
        best = i;
    }
    ++given[best];
  }
  return given;
}

}  // namespace
}  // namespace kt
