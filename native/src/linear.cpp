// A linear layer, or one for each head: an item of work is a block of rows and a few panels of one head.
#include <algorithm>
#include <cstdint>

#include "scratch.h"

namespace kt {
namespace {

// A call's rows in blocks, the panels of each head in groups; all blocks of a group before the next, so that the panels
// are read from memory once.
struct cut {
  std::size_t rows, blocks, panels, groups;
  cut(std::size_t all_rows, std::size_t most_rows, std::size_t heads, std::size_t all_panels, int threads)
      : rows(all_rows), panels(all_panels) {
    blocks = (rows + most_rows - 1) / most_rows;
    // Few items where each re-reads many rows: of rows that the second-level cache does not hold, each part is read
    // from the next cache for the panels of an item.
    const std::size_t items = (blocks == 1 ? 16 : 8) * static_cast<std::size_t>(threads);
    groups = std::min(panels, (items + heads * blocks - 1) / (heads * blocks));
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
  const cut items(a.rows, most_rows, a.heads, w.panels(), pool_.size());
  const std::size_t padded = w.layout().k, size = size_of(a.type), most = std::min<std::size_t>(most_rows, a.rows);
  const std::size_t scales = w.layout().row_scales(), group = static_cast<std::size_t>(format.group);
  // All rows packed once, those of a head together, block after block.
  buffer& packed = scratch_->rows;
  packed.reserve(a.heads * a.rows * gemm.row_bytes());
  scratch_->scale.reserve(a.heads * a.rows * scales * sizeof(float));
  const auto packed_rows = [&](std::size_t h, std::size_t row) {
    return packed.as((h * a.rows + row) * gemm.row_bytes());
  };
  const auto row_scales = [&](std::size_t h, std::size_t row) {
    return scratch_->scale.as<float>() + (h * a.rows + row) * scales;
  };
  for (thread_scratch& t : scratch_->threads) {
    t.rows.reserve(most * padded);
    t.c.reserve(gemm.c_bytes(most));
  }
  queue blocks(a.heads * items.blocks);
  auto pack = [&](int thread) {
    const denormals_are_zero mode;
    for (std::size_t i; blocks.has(i = blocks.take());) {
      const std::size_t h = i / items.blocks, b = i % items.blocks;
      const std::size_t first = items.first_row(b), rows = items.first_row(b + 1) - first;
      const char* in = static_cast<const char*>(a.in) + (h * a.in_head_stride + first * a.in_stride) * size;
      char* to = packed_rows(h, first);
      if (!dynamic) {
        kind.pack({in, a.type, a.in_stride, nullptr, static_cast<int>(rows), a.k, padded, to});
        continue;
      }
      std::int8_t* codes = scratch_->threads[thread].rows.as<std::int8_t>();
      k.quantize_rows({in, a.type, a.in_stride, rows, a.k, padded, codes, row_scales(h, first), group});
      kind.pack({codes, dtype::f32, padded, nullptr, static_cast<int>(rows), padded, padded, to});
    }
  };
  // Few rows are not worth waking the other threads up for.
  if (a.heads * a.rows > most_rows)
    pool_.run(pack);
  else
    pack(0);
  const std::size_t of_head = items.groups * items.blocks;
  // One stream of weights for each thread, where they come from memory.
  queue q(a.heads * of_head, items.blocks == 1 ? pool_.size() : 1);
  auto multiply = [&](int thread) {
    const denormals_are_zero mode;
    for (std::size_t i = q.take(thread), next; q.has(i); i = next) {
      next = q.take(thread);
      const std::size_t h = i / of_head, g = i % of_head / items.blocks, b = i % items.blocks;
      const std::size_t first = items.first_row(b), rows = items.first_row(b + 1) - first;
      const char* following =
          q.has(next) ? w.panel(next / of_head, items.first_panel(next % of_head / items.blocks)) : nullptr;
      char* out = static_cast<char*>(a.out) + (h * a.out_head_stride + first * a.out_stride) * size;
      gemm.run(h, items.first_panel(g), items.first_panel(g + 1), packed_rows(h, first), rows, row_scales(h, first),
               scratch_->threads[thread].c.as<float>(), following, [&](std::size_t p, const float* c) {
                 const std::size_t column = p * panel_columns;
                 k.store({c, w.panel_bias(h, p), rows,
                          static_cast<int>(std::min<std::size_t>(a.features - column, panel_columns)),
                          out + column * size, a.type, a.out_stride});
               });
    }
  };
  pool_.run(multiply);
}

}  // namespace kt
