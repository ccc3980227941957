#include <kt/nan_memory.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace kt {
namespace {

// Every mapping shows these pages again and again. Large, since the number of mappings of a process is limited.
constexpr std::size_t pattern_bytes = std::size_t{16} << 20;

std::size_t round_up(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

int make_pattern(dtype type) {
  const int file = memfd_create("kt_nan", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, pattern_bytes) != 0) throw std::bad_alloc();
  void* p = mmap(nullptr, pattern_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  const std::uint32_t bits = type == dtype::f32 ? 0x7fc00000u : type == dtype::f16 ? 0x7e007e00u : 0x7fc07fc0u;
  for (std::size_t i = 0; i < pattern_bytes / 4; ++i) static_cast<std::uint32_t*>(p)[i] = bits;
  munmap(p, pattern_bytes);
  return file;
}

// The file of a type's pattern, made at its first use.
int pattern(dtype type) {
  static std::mutex lock;
  static int files[num_dtypes] = {-1, -1, -1};
  const std::lock_guard guard(lock);
  int& file = files[static_cast<int>(type)];
  if (file < 0) file = make_pattern(type);
  return file;
}

}  // namespace

void* map_nan(std::size_t bytes, dtype type) {
  const int file = pattern(type);
  const std::size_t size = round_up(bytes);
  void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  for (std::size_t at = 0; at < size; at += pattern_bytes) {
    const std::size_t part = size - at < pattern_bytes ? size - at : pattern_bytes;
    if (mmap(static_cast<char*>(p) + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file,
             0) == MAP_FAILED) {
      munmap(p, size);
      throw std::bad_alloc();
    }
  }
  return p;
}

void unmap_nan(void* p, std::size_t bytes) { munmap(p, round_up(bytes)); }

}  // namespace kt
