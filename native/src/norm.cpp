// Root-mean-square normalisation of many rows.
#include <algorithm>

#include "scratch.h"

namespace kt {

void context::norm(const kernel_table& k, const norm_job& job, std::size_t rows) {
  // A thread is not worth waking up for fewer elements.
  constexpr std::size_t least = std::size_t{1} << 15;
  const std::size_t each = std::max<std::size_t>(1, least / job.size), parts = (rows + each - 1) / each;
  if (parts <= 1) {
    const denormals_are_zero mode;
    return k.norm(job, 0, rows);
  }
  const std::lock_guard lock(turn_);
  queue q(parts);
  auto normalise = [&](int) {
    const denormals_are_zero mode;
    for (std::size_t i; q.has(i = q.take());) k.norm(job, rows * i / parts, rows * (i + 1) / parts);
  };
  pool_.run(normalise);
}

}  // namespace kt
