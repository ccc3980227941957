// NUMA: the parser of CPU lists, topologies read from made-up /sys trees, the placement of threads, memory of a node.
#include <kt/buffer.h>
#include <kt/thread_pool.h>
#include <kt/topology.h>

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <sstream>

#include "check.h"

namespace {

namespace fs = std::filesystem;
using numbers = std::vector<int>;

std::mt19937 random_bits(7);

int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

// As Linux writes it.
std::string list_of(const numbers& ascending) {
  std::ostringstream text;
  for (std::size_t begin = 0, end; begin < ascending.size(); begin = end) {
    for (end = begin + 1; end < ascending.size() && ascending[end] == ascending[end - 1] + 1;) ++end;
    text << (begin ? "," : "") << ascending[begin];
    if (end - begin > 1) text << '-' << ascending[end - 1];
  }
  text << '\n';
  return text.str();
}

numbers range(int begin, int end) {
  numbers r(end - begin);
  std::iota(r.begin(), r.end(), begin);
  return r;
}

std::string describe(const kt::topology& t) {
  std::ostringstream s;
  for (const kt::numa_node& n : t.nodes) {
    s << "[node " << n.id << ", " << n.cores << " cores:";
    for (int cpu : n.cpus) s << ' ' << cpu;
    s << ']';
  }
  return s.str();
}

// A directory that looks like /sys to read_topology.
class sys_tree {
 public:
  sys_tree() {
    std::string name = (fs::temp_directory_path() / "ktcompile-sys-XXXXXX").string();
    root_ = mkdtemp(name.data()) ? name : std::string();
    check(!root_.empty(), "a temporary directory can be made");
  }
  ~sys_tree() {
    if (!root_.empty()) fs::remove_all(root_);
  }
  sys_tree(const sys_tree&) = delete;
  sys_tree& operator=(const sys_tree&) = delete;

  void write(const std::string& path, const std::string& text) {
    const fs::path file = fs::path(root_) / "devices/system" / path;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
    files_.insert(path);
  }
  void remove(const std::string& path) { fs::remove_all(fs::path(root_) / "devices/system" / path); }
  void make_directory(const std::string& path) {
    remove(path);
    fs::create_directories(fs::path(root_) / "devices/system" / path);
  }
  void core(const numbers& cpus) {
    for (int cpu : cpus) write("cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list", list_of(cpus));
  }
  void node(int id, const numbers& cpus, const std::string& distance) {
    write("node/node" + std::to_string(id) + "/cpulist", list_of(cpus));
    write("node/node" + std::to_string(id) + "/distance", distance);
  }
  const std::string& root() const { return root_; }
  const std::set<std::string>& files() const { return files_; }

  void expect(const numbers& allowed, const std::string& wanted, const std::string& what) const {
    const std::string got = describe(kt::read_topology(root_, allowed));
    check(got == wanted, what + ": " + got + ", not " + wanted);
  }

 private:
  std::string root_;
  std::set<std::string> files_;  // that were ever written
};

// Two nodes of two cores of two threads, numbered in turns: core (c, c + 4) is on node c % 2.
void fill_two_nodes(sys_tree& sys) {
  sys.write("cpu/online", "0-7\n");
  for (int c = 0; c < 4; ++c) sys.core({c, c + 4});
  sys.write("node/online", "0-1\n");
  sys.write("node/has_memory", "0-1\n");
  sys.node(0, {0, 2, 4, 6}, "10 21\n");
  sys.node(1, {1, 3, 5, 7}, "21 10\n");
}

// By the letter: pieces between commas, digits around at most one dash.
std::optional<numbers> naive_parse(std::string text) {
  if (!text.empty() && text.back() == '\n') text.pop_back();
  numbers all;
  if (text.empty()) return all;
  std::istringstream pieces(text + ",");
  for (std::string piece; std::getline(pieces, piece, ',');) {
    long ends[2] = {0, 0};
    int digits[2] = {0, 0}, dashes = 0;
    for (char c : piece) {
      if (c == '-') {
        if (++dashes > 1) return std::nullopt;
      } else if (c >= '0' && c <= '9') {
        ends[dashes] = std::min(ends[dashes] * 10 + (c - '0'), 100000l);
        ++digits[dashes];
      } else {
        return std::nullopt;
      }
    }
    if (!digits[0] || (dashes && !digits[1])) return std::nullopt;
    if (!dashes) ends[1] = ends[0];
    if (ends[1] < ends[0] || ends[1] >= 8192 || (!all.empty() && ends[0] <= all.back())) return std::nullopt;
    for (long i = ends[0]; i <= ends[1]; ++i) all.push_back(static_cast<int>(i));
  }
  return all;
}

void test_lists() {
  const auto parsed = [](const std::string& text, const numbers& wanted) {
    check(kt::parse_cpu_list(text) == wanted, "the list '" + text + "'");
  };
  parsed("0-3,8,10-11", {0, 1, 2, 3, 8, 10, 11});
  parsed("0\n", {0});
  parsed("5-5", {5});
  parsed("", {});
  parsed("\n", {});
  parsed("8191", {8191});
  for (const char* bad : {"-1",
                          "1-",
                          "3-2",
                          "1,",
                          ",1",
                          "1,,2",
                          "0-1-2",
                          "1 ",
                          " 1",
                          "1\n\n",
                          "0x1",
                          "+1",
                          "a",
                          "0-3:1/2",
                          "2,1",
                          "1,1",
                          "0-3,3",
                          "8192",
                          "0-8192",
                          "4294967296",
                          "99999999999999999999",
                          "0-4294967295",
                          "18446744073709551616-18446744073709551617",
                          "--",
                          ","})
    check(!kt::parse_cpu_list(bad), std::string("no list: '") + bad + "'");
  check(!kt::parse_cpu_list(std::string_view("1\0", 2)), "no list: a zero byte");

  const std::string alphabet = "0123456789--,,,\n x";
  for (int i = 0; i < (quick ? 500 : 50000); ++i) {
    numbers some;
    const int rare = 1 + below(4);
    for (int cpu = below(3); cpu < 150; ++cpu)
      if (below(rare) == 0) some.push_back(cpu);
    std::string text = list_of(some);
    check(kt::parse_cpu_list(text) == some, "a random list, " + text);
    for (int changes = 1 + below(3); changes-- > 0;) {
      const char c = alphabet[below(static_cast<int>(alphabet.size()))];
      const int at = below(static_cast<int>(text.size()) + 1);
      if (below(2) || at == static_cast<int>(text.size())) {
        text.insert(text.begin() + at, c);
      } else {
        text[at] = c;
      }
    }
    check(kt::parse_cpu_list(text) == naive_parse(text), "a damaged list, '" + text + "'");
    std::string garbage(below(8), ' ');
    for (char& c : garbage)
      c = below(4) ? alphabet[below(static_cast<int>(alphabet.size()))] : static_cast<char>(below(128));
    check(kt::parse_cpu_list(garbage) == naive_parse(garbage), "garbage, '" + garbage + "'");
  }
}

void test_trees() {
  {
    sys_tree sys;
    sys.expect({0, 1, 5}, "[node -1, 3 cores: 0 1 5]", "nothing in /sys");
    sys.expect({}, "[node -1, 0 cores:]", "no CPU at all");
    sys.core({0, 1});
    sys.expect({5, 1, 0, 1}, "[node -1, 2 cores: 0 5 1]", "no nodes; CPUs in any order");
  }
  {
    sys_tree sys;
    fill_two_nodes(sys);
    sys.expect(range(0, 8), "[node 0, 2 cores: 0 2 4 6][node 1, 2 cores: 1 3 5 7]", "two nodes");
    sys.expect({0, 2, 4, 6}, "[node 0, 2 cores: 0 2 4 6]", "node 1 is not allowed");
    sys.expect({3, 5, 7}, "[node 1, 2 cores: 3 5 7]", "node 0 is not allowed, nor CPU 1, so 5 stands for its core");
    sys.expect({0, 4, 7}, "[node 0, 1 cores: 0 4][node 1, 1 cores: 7]", "a part of both");
    sys.expect({0, 1, 100}, "[node 0, 1 cores: 0][node 1, 1 cores: 1]", "a CPU that is allowed and not online");
    sys.expect({100}, "[node -1, 1 cores: 100]", "no CPU that is online");
    sys.write("cpu/online", "0-2,4,6-7\n");
    sys.expect(range(0, 8), "[node 0, 2 cores: 0 2 4 6][node 1, 2 cores: 1 7]", "offline CPUs");
    sys.remove("cpu/online");
    sys.remove("cpu/cpu6");
    sys.write("cpu/cpu4/topology/thread_siblings_list", "4-0\n");
    sys.expect(range(0, 8), "[node 0, 4 cores: 0 2 4 6][node 1, 2 cores: 1 3 5 7]", "without siblings, a core");
    sys.write("node/has_memory", "0\n");
    sys.expect({1, 3}, "[node 0, 2 cores: 1 3]", "all allowed CPUs are on a node without memory");
    sys.remove("node/has_memory");
    sys.write("node/has_normal_memory", "0-1\n");
    sys.expect({0, 1}, "[node 0, 1 cores: 0][node 1, 1 cores: 1]", "an old kernel");
  }
  {
    sys_tree sys;  // 4 threads to a core, in blocks and in turns
    for (int c : {0, 4}) sys.core(range(c, c + 4));
    for (int c : {8, 9}) sys.core({c, c + 2, c + 4, c + 6});
    sys.expect(range(0, 16), "[node -1, 4 cores: 0 4 8 9 1 5 10 11 2 6 12 13 3 7 14 15]", "four threads to a core");
  }
  {
    sys_tree sys;  // 0 and 4 with memory, 1 and 3 without, 6 with memory alone; 2 and 5 do not exist
    sys.write("node/online", "0-1,3-4,6\n");
    sys.write("node/has_memory", "0,4,6\n");
    sys.node(0, {0, 1}, "10 20 30 40 50\n");
    sys.node(1, {2, 3}, "20 10 10 20 20\n");  // 3 is nearer, but has no memory; 0, 4 and 6 are equally far
    sys.node(3, {4, 5}, "30 20 10 20 25\n");
    sys.node(4, {6, 7}, "40 30 20 10 50\n");
    sys.node(6, {}, "50 20 25 50 10\n");
    sys.expect(range(0, 8), "[node 0, 4 cores: 0 1 2 3][node 4, 4 cores: 4 5 6 7]", "nodes without memory");
    sys.expect({4}, "[node 4, 1 cores: 4]", "a CPU without memory of its own");
    sys.write("node/node3/distance", "30 20 10 20 15\n");
    sys.expect(range(0, 8), "[node 0, 4 cores: 0 1 2 3][node 4, 2 cores: 6 7][node 6, 2 cores: 4 5]",
               "memory whose nearest CPUs are of another node");
    for (const char* distance : {"", "30 20 10 20\n", "30 20 x 20 15\n", "99999999999 20 10 20 15\n"}) {
      sys.write("node/node3/distance", distance);
      sys.expect(range(0, 8), "[node 0, 6 cores: 0 1 2 3 4 5][node 4, 2 cores: 6 7]", "distances that cannot be read");
    }
  }
  // Each of these leaves a tree that contradicts itself.
  const std::map<std::string, std::vector<std::string>> damage = {
      {"node/online", {"", "\n", "0", "0-", "x", "0-4294967295", "0-2\n", "7\n"}},
      {"node/has_memory", {"\n", "5\n"}},
      {"node/node0/cpulist", {"", "\n", "0,2", "0-7\n", "0,2,4,6,", "-", "6,4,2,0\n", "junk"}}};
  for (const auto& [file, texts] : damage)
    for (const std::string& text : texts) {
      sys_tree sys;
      fill_two_nodes(sys);
      sys.write(file, text);
      sys.expect(range(0, 8), "[node -1, 4 cores: 0 1 2 3 4 5 6 7]", file + " is '" + text + "'");
    }
  for (const char* file : {"node/online", "node/has_memory", "node/node1/cpulist", "node/node1", "node"})
    for (bool directory : {false, true}) {
      sys_tree sys;
      fill_two_nodes(sys);
      directory ? sys.make_directory(file) : sys.remove(file);
      sys.expect(range(0, 8), "[node -1, 4 cores: 0 1 2 3 4 5 6 7]", std::string(file) + " is no file");
    }
}

// What holds of any topology that is read with these allowed CPUs.
void check_sane(const kt::topology& t, const numbers& allowed, const std::string& what) {
  std::set<int> seen;
  bool right = !t.nodes.empty();
  for (std::size_t i = 0; i < t.nodes.size(); ++i) {
    const kt::numa_node& n = t.nodes[i];
    right = right && (i == 0 || t.nodes[i - 1].id < n.id) && 1 <= n.cores && n.cores <= static_cast<int>(n.cpus.size());
    right = right && (n.id >= 0 || t.nodes.size() == 1) && std::is_sorted(n.cpus.begin(), n.cpus.begin() + n.cores);
    for (int cpu : n.cpus) right = right && seen.insert(cpu).second && std::count(allowed.begin(), allowed.end(), cpu);
  }
  check(right, what + ": " + describe(t));
}

void test_damaged_trees() {
  const std::string alphabet = "0123456789,,--\n x";
  const numbers allowed = range(0, 8);
  for (int i = 0; i < (quick ? 5 : 100); ++i) {
    sys_tree sys;
    fill_two_nodes(sys);
    const std::vector<std::string> files(sys.files().begin(), sys.files().end());
    for (int change = 0; change < 8; ++change) {
      const std::string& file = files[below(static_cast<int>(files.size()))];
      std::string text(below(6), ' ');
      for (char& c : text)
        c = below(8) ? alphabet[below(static_cast<int>(alphabet.size()))] : static_cast<char>(below(128));
      below(5) ? sys.write(file, text) : sys.remove(file);
      const kt::topology t = kt::read_topology(sys.root(), allowed);
      check_sane(t, allowed, file + " is '" + text + "'");
      for (int threads : {1, 3, 8, 9}) kt::assign(t, threads);
    }
  }
}

kt::topology made_of(const std::vector<std::pair<int, int>>& cores_and_cpus) {
  kt::topology t;
  int id = 0, cpu = 0;
  for (const auto& [cores, cpus] : cores_and_cpus) {
    t.nodes.push_back({id++, range(cpu, cpu + cpus), cores});
    cpu += cpus;
  }
  return t;
}

void test_assign() {
  const auto expect = [](const kt::topology& t, int threads, const numbers& node, const numbers& cpu) {
    const kt::placement p = kt::assign(t, threads);
    check(p.node == node && p.cpu == cpu, std::to_string(threads) + " threads on " + describe(t));
  };
  const kt::topology two = made_of({{2, 4}, {2, 4}});
  expect(two, 1, {0}, {0});
  expect(two, 2, {0, 1}, {0, 4});
  expect(two, 3, {0, 0, 1}, {0, 1, 4});
  expect(two, 4, {0, 0, 1, 1}, {0, 1, 4, 5});
  expect(two, 8, {0, 0, 0, 0, 1, 1, 1, 1}, range(0, 8));
  expect(two, 9, {0, 0, 0, 0, 0, 1, 1, 1, 1}, numbers(9, -1));
  expect(made_of({{4, 8}}), 3, {0, 0, 0}, {-1, -1, -1});
  expect(made_of({{0, 0}}), 2, {0, 0}, {-1, -1});
  expect(made_of({{6, 6}, {2, 2}}), 4, {0, 0, 0, 1}, {0, 1, 2, 6});
  expect(made_of({{9, 9}, {1, 1}}), 2, {0, 1}, {0, 9});  // no node goes without
  // Node 0 has the cores, node 1 the hardware threads.
  expect(made_of({{3, 3}, {1, 4}}), 6, {0, 0, 0, 1, 1, 1}, {0, 1, 2, 3, 4, 5});
  const kt::placement shared = kt::assign(made_of({{1, 1}, {1, 1}, {1, 1}}), 2);
  check(shared.teams[0].begin == 0 && shared.teams[1].begin == 0 && shared.teams[2].begin == 1, "nodes share threads");
  check(shared.node == numbers({0, 2}) && shared.cpu == numbers({0, 2}), "at home in the first of its nodes");

  for (int i = 0; i < (quick ? 20 : 500); ++i) {
    std::vector<std::pair<int, int>> sizes(1 + below(5));
    for (auto& [cores, cpus] : sizes) {
      cores = 1 + below(8);
      cpus = cores + below(cores + 1);
    }
    const kt::topology t = made_of(sizes);
    const int n = static_cast<int>(sizes.size());
    int cores = 0, cpus = 0;
    for (const kt::numa_node& node : t.nodes) {
      cores += node.cores;
      cpus += static_cast<int>(node.cpus.size());
    }
    numbers before(n, 0);
    for (int threads = 1; threads < 2 * cpus; ++threads) {
      const kt::placement p = kt::assign(t, threads);
      const std::string what = std::to_string(threads) + " threads on " + describe(t);
      bool whole = static_cast<int>(p.teams.size()) == n && p.teams[0].begin == 0 && p.teams[n - 1].end == threads;
      bool grows = true, full = true, apart = true, local = true;
      for (int k = 0; k < n; ++k) {
        const auto [begin, end] = p.teams[k];
        whole = whole && begin < end && (k == 0 || threads < n || begin == p.teams[k - 1].end);
        full = full && (threads != cores || end - begin == t.nodes[k].cores);
        full = full && (threads != cpus || end - begin == static_cast<int>(t.nodes[k].cpus.size()));
        if (threads >= n) {
          // Where the CPUs run out the limit of one thread to each falls, and threads move.
          grows = grows && (threads == cpus + 1 || end - begin >= before[k]);
          before[k] = end - begin;
          for (int thread = begin; thread < end; ++thread) whole = whole && p.node[thread] == k;
        }
      }
      std::set<int> used;
      for (int thread = 0; thread < threads; ++thread) {
        const numbers& own = t.nodes[p.node[thread]].cpus;
        const int cpu = p.cpu[thread];
        apart = apart && (cpu >= 0) == (n > 1 && threads <= cpus) && (cpu < 0 || used.insert(cpu).second);
        local = local && (cpu < 0 || std::count(own.begin(), own.end(), cpu));
        local = local && (cpu < 0 || threads > cores || cpu < own[t.nodes[p.node[thread]].cores - 1] + 1);
      }
      check(whole, "teams, " + what);
      check(grows && full, "shares, " + what);
      check(apart && local, "CPUs, " + what);
    }
  }
}

void test_pinning() {
  const numbers mine = kt::allowed_cpus();
  check(!mine.empty() && std::is_sorted(mine.begin(), mine.end()), "allowed_cpus");
  check_sane(kt::read_topology(), mine, "this machine");
  const int first = mine.front(), last = mine.back();
  kt::thread_pool pool(4, {first, last, -1, first});
  std::vector<numbers> seen(4);
  auto look = [&](int thread) { seen[thread] = kt::allowed_cpus(); };
  pool.run(look);
  check(seen[0] == numbers{first} && seen[1] == numbers{last}, "threads stay on their CPUs");
  check(seen[2] == mine, "a thread without a CPU goes where it may");
  check(seen[3] == mine && kt::allowed_cpus() == mine, "the calling thread is left alone");
  kt::thread_pool nowhere(3, {8191, 1 << 20, 0});
  nowhere.run(look);
  check(seen[0] == mine && seen[1] == mine, "a CPU that is not there is no constraint");
  kt::thread_pool free(2);
  free.run(look);
  check(seen[0] == mine, "a pool without CPUs");
}

// Of the memory at `p`, as the kernel tells it: the policy, or -1, and the one node in its set, or -1.
std::pair<int, int> policy_of(const void* p) {
  unsigned long mask[16] = {};
  int mode = -1;
  if (syscall(SYS_get_mempolicy, &mode, mask, 1025ul, p, static_cast<unsigned long>(MPOL_F_ADDR)) != 0) return {-1, -1};
  for (int node = 0; node < 1024; ++node)
    if (mask[node / 64] >> node % 64 & 1) return {mode, node};
  return {mode, -1};
}

// A node that this process may have memory of; -1: the kernel does not say.
int node_with_memory() {
  unsigned long mask[16] = {};
  const auto allowed = static_cast<unsigned long>(MPOL_F_MEMS_ALLOWED);
  if (syscall(SYS_get_mempolicy, nullptr, mask, 1025ul, nullptr, allowed) != 0) return -1;
  for (int node = 0; node < 1024; ++node)
    if (mask[node / 64] >> node % 64 & 1) return node;
  return -1;
}

void test_memory_of_a_node() {
  constexpr std::size_t huge = std::size_t{2} << 20;
  const int there = node_with_memory();
  const kt::buffer plain(1);
  const std::pair<int, int> policy = policy_of(plain.as());  // of this process
  for (std::size_t bytes : {std::size_t{1}, std::size_t{5000}, huge, 2 * huge + 1})
    for (int node : {-1, there, 1000, 1023, 1024, 1 << 30}) {
      kt::buffer b(bytes, node);
      const std::string what = std::to_string(bytes) + " bytes of node " + std::to_string(node);
      check(b.bytes() >= bytes && b.node() == node && b.as()[0] == 0 && b.as()[bytes - 1] == 0, what + " are zero");
      check(bytes < huge || reinterpret_cast<std::uintptr_t>(b.as()) % huge == 0, what + " are on a huge page");
      std::fill(b.as(), b.as() + b.bytes(), 1);
      if (there >= 0) {
        const auto wanted = node == there ? std::pair<int, int>(MPOL_PREFERRED, node) : policy;
        check(policy_of(b.as()) == wanted && policy_of(b.as() + bytes - 1) == wanted, what + ": the kernel knows");
      }
      b.reserve(3 * bytes + huge);
      check(b.node() == node && b.bytes() >= 3 * bytes + huge && b.as()[3 * bytes] == 0, what + " grow on their node");
      if (node == there && there >= 0) check(policy_of(b.as()).second == node, what + " are still there");
      kt::buffer moved = std::move(b), assigned;
      assigned = std::move(moved);
      check(assigned.node() == node && !moved.as() && assigned.as()[0] == 0, what + " move");
    }
  kt::buffer empty(0, 3);
  check(!empty.as() && empty.node() == 3, "an empty buffer of a node");
  empty.reserve(100);
  check(empty.as()[99] == 0 && empty.node() == 3, "grows on it");
}

}  // namespace

const std::vector<test> topology_tests = {
    {"CPU lists", test_lists},
    {"/sys", test_trees},
    {"damaged /sys", test_damaged_trees},
    {"placement of threads", test_assign},
    {"pinned threads", test_pinning},
    {"memory of a node", test_memory_of_a_node},
};
