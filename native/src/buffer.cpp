#include <kt/buffer.h>

#include <sys/mman.h>

#include <new>

namespace kt {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

}  // namespace

buffer::buffer(std::size_t bytes) : bytes_(bytes) {
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
#if defined(MADV_HUGEPAGE)
    madvise(p, whole, MADV_HUGEPAGE);
#endif
  }
  data_ = p;
}

buffer::~buffer() {
  if (data_) munmap(data_, bytes_);
}

}  // namespace kt
