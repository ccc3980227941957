#include <kt/buffer.h>

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <new>

namespace kt {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

// Asks for pages of `node`; false: the kernel has no memory even to note that down. Preferred, not bound: when the node
// is full, slow memory of another is better than a killed process. By system call: libnuma would be a dependency for
// this alone.
bool prefer(void* p, std::size_t bytes, int node) {
  constexpr int max_nodes = 1024;  // the most that Linux can be built for
  constexpr int word = sizeof(unsigned long) * CHAR_BIT;
  if (node >= max_nodes) return true;
  unsigned long mask[max_nodes / word] = {};
  mask[node / word] = 1ul << node % word;
  // The kernel reads one bit fewer than it is told to.
  if (syscall(SYS_mbind, p, bytes, MPOL_PREFERRED, mask, max_nodes + 1ul, 0u) == 0) return true;
  // ENOSYS: a kernel without NUMA. EPERM: a container's filter. EINVAL: no such node, or none that the cpuset allows;
  // the other arguments are right for every node or for none, and the tests bind to one that exists.
  return errno == ENOSYS || errno == EPERM || errno == EINVAL;
}

}  // namespace

buffer::buffer(std::size_t bytes, int node) : bytes_(bytes), node_(node) {
  if (!bytes) return;
  // A mapping of whole huge pages starts on a huge page only by luck: map one more and give back the ends.
  const std::size_t whole = (bytes + huge_page - 1) / huge_page * huge_page;
  const bool huge = bytes >= huge_page;
  const std::size_t mapped = huge ? whole + huge_page : bytes;
  void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  if (huge) {
    char* begin = static_cast<char*>(p);
    const std::size_t address = reinterpret_cast<std::size_t>(begin);
    const std::size_t skip = (huge_page - address % huge_page) % huge_page;
    if (skip) munmap(begin, skip);
    if (mapped - skip - whole) munmap(begin + skip + whole, mapped - skip - whole);
    p = begin + skip;
    bytes_ = whole;
  }
  // Before anything can put a page there, and on what is left of the mapping: a policy does not move pages.
  if (node >= 0 && !prefer(p, bytes_, node)) {
    munmap(p, bytes_);
    throw std::bad_alloc();
  }
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(p, bytes_, MADV_HUGEPAGE);
#endif
  data_ = p;
}

buffer::~buffer() {
  if (data_ && owned_) munmap(data_, bytes_);
}

void buffer::discard(std::size_t offset, std::size_t bytes) const {
  static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t begin = (offset + page - 1) / page * page, end = (offset + bytes) / page * page;
  if (begin < end) madvise(as<char>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace kt
