// Page-aligned memory, in huge pages where the system has them.
#pragma once
#include <cstddef>
#include <utility>

namespace kt {

class buffer {
 public:
  buffer() = default;
  explicit buffer(std::size_t bytes);  // zeroed; throws std::bad_alloc
  buffer(buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~buffer();

  // At least `bytes`; the contents are lost when it grows.
  void reserve(std::size_t bytes) {
    if (bytes > bytes_) *this = buffer(bytes);
  }
  template <class T = char>
  T* as(std::size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset_bytes);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace kt
