// What is done to each of many rows: root-mean-square normalisation, rotary embedding.
#include <algorithm>

#include "scratch.h"

namespace kt {

template <class Job>
void context::each_row(void (*kernel)(const Job&, std::size_t, std::size_t), const Job& job, std::size_t rows) {
  // A thread is not worth waking up for fewer elements.
  constexpr std::size_t least = std::size_t{1} << 15;
  const std::size_t each = std::max<std::size_t>(1, least / job.size), parts = (rows + each - 1) / each;
  if (parts <= 1) {
    const denormals_are_zero mode;
    return kernel(job, 0, rows);
  }
  const std::lock_guard lock(turn_);
  queue q(parts);
  auto part = [&](int) {
    const denormals_are_zero mode;
    for (std::size_t i; q.has(i = q.take());) kernel(job, rows * i / parts, rows * (i + 1) / parts);
  };
  pool_.run(part);
}

void context::norm(const kernel_table& k, const norm_job& job, std::size_t rows) { each_row(k.norm, job, rows); }
void context::rotary(const kernel_table& k, const rotary_job& job, std::size_t heads) {
  each_row(k.rotary, job, heads);
}

}  // namespace kt
