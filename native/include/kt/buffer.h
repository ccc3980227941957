// Page-aligned memory, in huge pages where the system has them, on a NUMA node of choice; or a view of memory that
// another owns, for reading.
#pragma once
#include <cstddef>
#include <utility>

namespace kt {

class buffer {
 public:
  buffer() = default;
  // Zeroed; throws std::bad_alloc. `node`: id of the NUMA node whose memory it takes while there is some; -1: as the
  // kernel likes, and so too for a node that this machine lacks or that this process may not use.
  explicit buffer(std::size_t bytes, int node = -1);
  // Memory of another, which outlives the buffer: a file that is mapped. It is only read.
  static buffer view(const void* data, std::size_t bytes) {
    buffer b;
    b.data_ = const_cast<void*>(data);
    b.bytes_ = bytes;
    b.owned_ = false;
    return b;
  }
  buffer(buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        node_(other.node_),
        owned_(other.owned_) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(node_, other.node_);
    std::swap(owned_, other.owned_);
    return *this;
  }
  ~buffer();

  // At least `bytes`, on the same node; the contents are lost when it grows.
  void reserve(std::size_t bytes) {
    if (bytes > bytes_) *this = buffer(bytes, node_);
  }
  template <class T = char>
  T* as(std::size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset_bytes);
  }
  // Gives the whole pages in [offset, offset + bytes) back to the system; from then on they read as zero, those of a
  // file as the file.
  void discard(std::size_t offset, std::size_t bytes) const;
  std::size_t bytes() const { return bytes_; }
  int node() const { return node_; }
  bool owned() const { return owned_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  int node_ = -1;
  bool owned_ = true;
};

}  // namespace kt
