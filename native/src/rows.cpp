// What is done to each of many rows: root-mean-square normalisation, rotary embedding.
#include <algorithm>

#include "scratch.h"

namespace kt {

void context::each_row(std::size_t rows, std::size_t elements,
                       const std::function<void(std::size_t, std::size_t)>& part) {
  // A thread is not worth waking up for fewer elements.
  constexpr std::size_t least = std::size_t{1} << 15;
  const std::size_t each = std::max<std::size_t>(1, least / std::max<std::size_t>(1, elements));
  const std::size_t parts = (rows + each - 1) / each;
  if (parts <= 1) {
    const denormals_are_zero mode;
    return part(0, rows);
  }
  const std::lock_guard lock(turn_);
  queue q(parts);
  auto work = [&](int) {
    const denormals_are_zero mode;
    for (std::size_t i; q.has(i = q.take());) part(rows * i / parts, rows * (i + 1) / parts);
  };
  pool_.run(work);
}

void context::norm(const kernel_table& k, const norm_job& job, std::size_t rows) {
  each_row(rows, job.size, [&](std::size_t begin, std::size_t end) { k.norm(job, begin, end); });
}

void context::rotary(const kernel_table& k, const rotary_job& job, std::size_t heads) {
  each_row(heads, job.size, [&](std::size_t begin, std::size_t end) { k.rotary(job, begin, end); });
}

}  // namespace kt
