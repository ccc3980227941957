// A linear layer: an item of work is a block of rows and a few panels.
#include <algorithm>
#include <cstdint>

#include "scratch.h"

namespace kt {
namespace {

// A call's rows in blocks, its panels in groups; all blocks of a group before the next, so that the panels are read
// from memory once.
struct cut {
  std::size_t rows, blocks, panels, groups;
  cut(std::size_t all_rows, std::size_t most_rows, std::size_t all_panels, int threads)
      : rows(all_rows), panels(all_panels) {
    blocks = (rows + most_rows - 1) / most_rows;
    const std::size_t items = 16 * static_cast<std::size_t>(threads);
    groups = std::min(panels, items);
  }
  std::size_t first_row(std::size_t block) const { return rows * block / blocks; }
  std::size_t first_panel(std::size_t group) const { return panels * group / groups; }
};

}  // namespace

void context::linear(const packed_weight& w, const kernel_table& k, const linear_arguments& a) {
  if (!a.rows) return;
  const std::lock_guard lock(turn_);
  const weight_format& format = w.layout().format;
  const bool dynamic = is_dynamic(format.kind);
  const row_kernels& kind = k.rows_for(format.kind);
  const block_gemm gemm(k, w);
  const cut items(a.rows, most_rows, w.panels(), pool_.size());
  const std::size_t padded = w.layout().k, size = size_of(a.type), most = std::min<std::size_t>(most_rows, a.rows);
  const std::size_t scales = w.layout().row_scales(), group = static_cast<std::size_t>(format.group);
  // All rows packed once, block after block.
  buffer& packed = scratch_->rows;
  packed.reserve(a.rows * gemm.row_bytes());
  scratch_->scale.reserve(a.rows * scales * sizeof(float));
  for (thread_scratch& t : scratch_->threads) {
    t.rows.reserve(most * padded);
    t.c.reserve(gemm.c_bytes(most));
  }
  queue blocks(items.blocks);
  auto pack = [&](int thread) {
    const denormals_are_zero mode;
    for (std::size_t b; blocks.has(b = blocks.take());) {
      const std::size_t first = items.first_row(b), rows = items.first_row(b + 1) - first;
      const char* in = static_cast<const char*>(a.in) + first * a.in_stride * size;
      char* to = packed.as(first * gemm.row_bytes());
      if (!dynamic) {
        kind.pack({in, a.type, a.in_stride, nullptr, static_cast<int>(rows), a.k, padded, to});
        continue;
      }
      std::int8_t* codes = scratch_->threads[thread].rows.as<std::int8_t>();
      k.quantize_rows(
          {in, a.type, a.in_stride, rows, a.k, padded, codes, scratch_->scale.as<float>() + first * scales, group});
      kind.pack({codes, dtype::f32, padded, nullptr, static_cast<int>(rows), padded, padded, to});
    }
  };
  // One block is not worth waking the other threads up for.
  if (items.blocks > 1)
    pool_.run(pack);
  else
    pack(0);
  queue q(items.groups * items.blocks);
  auto multiply = [&](int thread) {
    const denormals_are_zero mode;
    for (std::size_t i = q.take(), next; q.has(i); i = next) {
      next = q.take();
      const std::size_t g = i / items.blocks, b = i % items.blocks;
      const std::size_t first = items.first_row(b), rows = items.first_row(b + 1) - first;
      const char* following = q.has(next) ? w.panel(0, items.first_panel(next / items.blocks)) : nullptr;
      gemm.run(0, items.first_panel(g), items.first_panel(g + 1), packed.as(first * gemm.row_bytes()), rows,
               scratch_->scale.as<float>() + first * scales, scratch_->threads[thread].c.as<float>(), following,
               [&](std::size_t p, const float* c) {
                 const std::size_t column = p * panel_columns;
                 k.store({c, w.panel_bias(0, p), rows,
                          static_cast<int>(std::min<std::size_t>(a.features - column, panel_columns)),
                          static_cast<char*>(a.out) + (first * a.out_stride + column) * size, a.type, a.out_stride});
               });
    }
  };
  pool_.run(multiply);
}

}  // namespace kt
