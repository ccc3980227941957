// Products of a block of packed rows with panels of one weight, blocked for the caches.
#pragma once
#include <kt/isa.h>
#include <kt/kernels.h>
#include <kt/packed.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>

namespace kt {

inline std::size_t l2_bytes() {
  static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return size > 0 ? static_cast<std::size_t>(size) : std::size_t{1} << 20;
}

// How weights are fetched ahead. Measured on Zen 4 and 5, which read a stream best when they are asked for that stream
// alone, and on Emerald Rapids, whose first-level cache can wait for no more than 16 lines: there the next panel is
// fetched into the second level. The first Zens (family 23; measured on Zen 1) are a tenth faster in two steps, of
// which one row, the fastest reader, takes the second alone. There what makes numbers fp32 takes turns with the
// products: it is done once for many rows.
struct machine_habits {
  std::size_t floats, codes;  // bytes ahead
  std::size_t near_floats;    // bytes ahead of the second step; 0: there is one
  bool stream_alone;          // of floats and dynamic codes, for few rows; more take as long as the next panel's way
                              // here, where products are not as fast as AVX512-BF16
  std::size_t codes_alone;    // bytes ahead of dynamic codes that are read alone
  bool widen;
};
inline machine_habits habits_here() {
  if (!cpu_is_amd()) return {1024, 1024, 0, false, 1024, false};
  const bool first_zens = cpu_family() == 23;
  return {8192, 2048, first_zens ? 1024u : 0u, true, first_zens ? 2048u : 8192u, first_zens};
}
// Of the weights that begin to be multiplied; tests change them.
inline machine_habits& habits() {
  static machine_habits here = habits_here();
  return here;
}

// Kernels of one weight on rows of one kind.
class block_gemm {
 public:
  block_gemm(const kernel_table& kernels, const packed_weight& w)
      : gemm_(kernels.gemm[static_cast<int>(w.layout().format.kind)]),
        w_(w),
        row_bytes_(w.layout().k * kernels.rows_for(w.layout().format.kind).bytes) {
    const machine_habits& here = habits();
    const bool floats = is_float(w.layout().format.kind);
    distance_ = floats ? here.floats : here.codes;
    near_ = floats ? here.near_floats : 0;
    if (here.stream_alone) {
      if (floats) stream_rows_ = kernels.rows_in_bf16 ? bf16_tile : few_rows;
      if (is_dynamic(w.layout().format.kind)) stream_rows_ = dynamic_tile;
    }
    distance_alone_ = floats ? here.floats : here.codes_alone;
    widen_ = here.widen;
  }

  std::size_t row_bytes() const { return row_bytes_; }
  // Bytes of `c` that are enough for blocks of up to this many rows.
  std::size_t c_bytes(std::size_t rows) const {
    const std::size_t one = std::max(rows, 2 * few_rows) * panel_columns * sizeof(float);
    return chunk(rows) == w_.layout().k ? one : std::max(one, sums_bytes());
  }

  // Calls done(p, c [rows][32]) for panels [first, last) of an expert, ascending. `following` is what the thread
  // multiplies afterwards, fetched meanwhile; null: nothing.
  template <class F>
  void run(std::size_t expert, std::size_t first, std::size_t last, const void* rows_packed, std::size_t rows,
           const float* row_scale, float* c, const char* following, F done) const {
    const panel_layout& l = w_.layout();
    const std::size_t step = chunk(rows), most = at_once(rows);
    const bool one_step = rows == 1 && near_, streams = rows <= stream_rows_;
    const std::size_t ahead = one_step ? near_ : streams ? distance_alone_ : distance_;
    for (std::size_t begin = first; begin < last; begin += most) {
      const std::size_t end = std::min(begin + most, last);
      const char* after = end < last ? w_.panel(expert, end) : following;
      // Where rows do not fit into the cache all panels go over a part of K before the next part.
      for (std::size_t k = 0; k < l.k; k += step) {
        const std::size_t k_end = std::min(k + step, l.k), offset = l.code_offset(k);
        for (std::size_t p = begin, count; p < end; p += count) {
          count = rows <= few_rows ? std::min<std::size_t>(2, end - p) : 1;
          const char* next = p + count < end ? w_.panel(expert, p + count) + offset
                             : k_end < l.k   ? w_.panel(expert, begin) + l.code_offset(k_end)
                                             : after;
          gemm_({w_.panel(expert, p), static_cast<int>(count), &l, rows_packed, static_cast<int>(rows), k, k_end,
                 c + (p - begin) * rows * panel_columns, row_scale, streams ? nullptr : next, ahead,
                 streams ? next : nullptr, one_step ? 0 : near_, widen_});
        }
      }
      for (std::size_t p = begin; p < end; ++p) done(p, c + (p - begin) * rows * panel_columns);
    }
  }

 private:
  // How much of K is multiplied at once: near-equal parts, in which the rows take half of the second-level cache.
  std::size_t chunk(std::size_t rows) const {
    const std::size_t k = w_.layout().k, cache = l2_bytes() / 2;
    const std::size_t parts = std::clamp<std::size_t>((rows * row_bytes_ + cache - 1) / cache, 1, (k + 511) / 512);
    return parts == 1 ? k : (k / parts + 127) / 128 * 128;
  }
  // Few rows take two panels, which shortens no sum but has twice as many under way. Where K is cut, as many as have
  // sums that take a quarter of the cache.
  std::size_t at_once(std::size_t rows) const {
    if (chunk(rows) == w_.layout().k) return rows <= few_rows ? 2 : 1;
    return std::max<std::size_t>(1, sums_bytes() / (rows * panel_columns * sizeof(float)));
  }

  static std::size_t sums_bytes() { return l2_bytes() / 4; }
  static constexpr std::size_t few_rows = 4;
  static constexpr std::size_t bf16_tile = 12;    // rows that AVX512-BF16 holds in registers
  static constexpr std::size_t dynamic_tile = 8;  // rows of codes whose products take less than their way here

  void (*const gemm_)(const gemm_job&);
  const packed_weight& w_;
  const std::size_t row_bytes_;
  std::size_t distance_, distance_alone_, near_, stream_rows_ = 0;
  bool widen_;
};

}  // namespace kt
