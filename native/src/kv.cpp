// Keys and values are quantised as they are stored.
#include <algorithm>

#include "scratch.h"

namespace kt {

void context::store_kv(const kernel_table& k, const store_kv_arguments& a) {
  const auto store = [&](std::size_t begin, std::size_t end) {
    const denormals_are_zero mode;
    for (std::size_t i = begin; i < end; ++i) {
      const auto token = static_cast<std::ptrdiff_t>(i / a.heads), head = static_cast<std::ptrdiff_t>(i % a.heads);
      if (a.slots[token] < 0) continue;
      const std::int64_t block = a.slots[token] / a.block_size, position = a.slots[token] % a.block_size;
      const auto at = [&](const attention_strides& s) {
        return block * s.sequence + head * s.head + position * s.position;
      };
      const std::ptrdiff_t from = token * a.token_stride + head * a.head_stride;
      k.quantize_rows({static_cast<const char*>(a.rows) + from * static_cast<std::ptrdiff_t>(size_of(a.type)), a.type,
                       a.group, a.size / a.group, a.group, a.group, a.codes + at(a.code_strides),
                       a.scales + at(a.scale_strides), 0});
    }
  };
  // A thread is not worth waking up for fewer elements.
  constexpr std::size_t least = std::size_t{1} << 15;
  const std::size_t rows = a.tokens * a.heads, each = std::max<std::size_t>(1, least / a.size);
  const std::size_t parts = (rows + each - 1) / each;
  if (parts <= 1) return store(0, rows);
  const std::lock_guard lock(turn_);
  queue q(parts);
  auto run = [&](int) {
    for (std::size_t i; q.has(i = q.take());) store(rows * i / parts, rows * (i + 1) / parts);
  };
  pool_.run(run);
}

}  // namespace kt
