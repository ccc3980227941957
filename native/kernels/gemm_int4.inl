// Products of codes of four bits with rows in int8 (int4_dyn): integer sums of each group, exact on every instruction
// set, then one fused multiply-add. Needs `unpack.inl`, and of `dot` that `int4_rows` are the most whose sums registers
// hold, and that with `sums_last` the sums of 32 k are totals, and hold those of a group.

// M rows, of `rows` that lie beside each other, and the columns of some loads from `load` on: a load has the codes of
// `vec::lanes` columns in the lower halves of its bytes, and those of the columns 16 further in the upper ones.
// `row_scales`: of the first row, `stride` floats before those of the next. c has what the groups before have added up
// to.
template <class Dot, bool Zeros, int M, int Loads>
[[gnu::noinline]] void int4_tile(const gemm_job& job, int load, const std::uint32_t* a, std::size_t rows,
                                 const float* row_scales, std::size_t stride, float* c, prefetch fetch) {
  constexpr int n = 2 * Loads, sums_of = 32;  // k of one `Dot::sums`
  // Whether what the groups add up to stays in registers too.
  constexpr bool in_registers = Dot::sums_last && 2 * M * n <= vec::accumulators;
  const panel_layout& l = *job.layout;
  const scale_type type = l.format.scale;
  const char* const panel = static_cast<const char*>(job.panel);
  const auto column = [load](int v) { return (load + v / 2) * vec::lanes + v % 2 * panel_columns / 2; };
  const char* const end = panel + l.code_offset(job.k_begin) + part_bytes(job);
  vec::f32 acc[M][n];
  if (in_registers)
    KT_UNROLLED (m, M)
      KT_UNROLLED (v, n) acc[m][v] = vec::load(c + m * panel_columns + column(v));
  for (group_walk<4> walk(job); walk.k() < job.k_end;) {
    const std::size_t begin = walk.k(), stop = walk.stop(job.k_end);
    const char* codes = panel + walk.codes();
    const std::uint32_t* const row_sums = reinterpret_cast<const std::uint32_t*>(row_scales + 1);
    const char* const own = panel + walk.scales();
    // The last groups fetch what comes behind them all.
    const std::size_t ahead =
        fetch.distance + (codes + fetch.distance < end ? 0 : static_cast<std::size_t>(fetch.jump));
    typename Dot::i32 total[M][n];
    typename Dot::sums sums[M][n];
    for (std::size_t k = begin; k < stop; k += sums_of) {
      // They begin with the zero points times the sum of the row's codes, to be taken away.
      KT_UNROLLED (m, M) {
        const typename Dot::i32 row = Dot::set1(row_sums[m * stride + (k - begin) / sums_of]);
        KT_UNROLLED (v, n) {
          const typename Dot::sums first =
              Zeros ? Dot::int4_start(row, own + 2 * panel_columns + column(v)) : Dot::int4_start(row);
          if constexpr (Dot::sums_last)
            sums[m][v] = k == begin ? first : Dot::add(sums[m][v], first);
          else
            sums[m][v] = first;
        }
      }
      for (int i = 0; i < fetch.lines * sums_of / 4; ++i, fetch.next += 64) prefetch_l2(fetch.next);
      const auto multiply_quad = [&]() __attribute__((always_inline)) {
        prefetch_l1(codes + ahead);
        decltype(Dot::low_codes(codes)) b[n];
        KT_UNROLLED (i, Loads) {
          b[2 * i] = Dot::low_codes(codes + (load + i) * vec::lanes * 4);
          b[2 * i + 1] = Dot::high_codes(codes + (load + i) * vec::lanes * 4);
        }
        KT_UNROLLED (m, M) {
          const typename Dot::i32 x = Dot::set1(a[m]);
          KT_UNROLLED (v, n) sums[m][v] = Dot::add_int4(sums[m][v], x, b[v]);
        }
        codes += 64;
        a += rows;
      };
      if constexpr (Dot::sums_last) {
        for (int quad = 0; quad < sums_of / 4; ++quad) multiply_quad();
      } else {
#pragma GCC unroll 2
        for (int quad = 0; quad < sums_of / 4; ++quad) multiply_quad();
      }
      if constexpr (!Dot::sums_last)
        KT_UNROLLED (m, M)
          KT_UNROLLED (v, n)
            total[m][v] = k == begin ? Dot::total(sums[m][v]) : Dot::add(total[m][v], Dot::total(sums[m][v]));
    }
    prefetch_l1(own + ahead);
    KT_UNROLLED (v, n) {
      const vec::f32 scale = load_scale(type, own, column(v));
      KT_UNROLLED (m, M) {
        const vec::f32 both = vec::mul(scale, vec::set1(row_scales[m * stride]));
        vec::f32 sum;
        if constexpr (Dot::sums_last)
          sum = Dot::to_float(sums[m][v]);
        else
          sum = Dot::to_float(total[m][v]);
        float* to = c + m * panel_columns + column(v);
        if (in_registers)
          acc[m][v] = vec::fma(both, sum, acc[m][v]);
        else
          vec::store(to, vec::fma(both, sum, vec::load(to)));
      }
    }
    row_scales += 1 + (stop - begin) / sums_of;
    walk.go_to(stop);
  }
  if (in_registers)
    KT_UNROLLED (m, M)
      KT_UNROLLED (v, n) vec::store(c + m * panel_columns + column(v), acc[m][v]);
}

template <class Dot, bool Zeros, int M>
void int4_columns(const gemm_job& job, const std::uint32_t* a, std::size_t rows, const float* row_scales,
                  std::size_t stride, float* c, prefetch fetch) {
  constexpr int loads = Dot::int4_loads(M), all = column_vectors / 2;
  static_assert(all % loads == 0);
  for (int load = 0; load < all; load += loads)
    int4_tile<Dot, Zeros, M, loads>(job, load, a, rows, row_scales, stride, c,
                                    load == 0 ? fetch : prefetch{fetch.distance, nullptr, 0, 0, fetch.jump});
}

using int4_function = void (*)(const gemm_job&, const std::uint32_t*, std::size_t, const float*, std::size_t, float*,
                               prefetch);

template <class Dot, bool Zeros>
void gemm_int4_rows(const gemm_job& job) {
  constexpr int most = Dot::int4_rows;
  static constexpr functions_by_rows<int4_function, most> tiles(
      [](auto rows) { return &int4_columns<Dot, Zeros, rows()>; });
  const panel_layout& l = *job.layout;
  const tiling<> cut(job.rows);
  const panel_fetch fetch(job, (job.k_end - job.k_begin) / 4);
  const std::size_t stride = l.row_scales();
  const float* scales = job.row_scale + job.k_begin / l.group + job.k_begin / 32;
  if (job.k_begin == 0) __builtin_memset(job.c, 0, static_cast<std::size_t>(job.rows) * panel_columns * sizeof(float));
  for (int t = 0; t < cut.count; ++t) {
    const std::size_t begin = cut.begin(t), rows = cut.begin(t + 1) - begin;
    const auto* a = static_cast<const std::uint32_t*>(job.rows_packed) + (begin * l.k + job.k_begin * rows) / 4;
    const tiling<> parts(static_cast<int>(rows), most);
    prefetch ahead = fetch(t);
    for (int p = 0; p < parts.count; ++p, ahead.next = nullptr, ahead.lines = 0) {
      const std::size_t first = parts.begin(p);
      tiles[parts.begin(p + 1) - first](job, a + first, rows, scales + (begin + first) * stride, stride,
                                        job.c + (begin + first) * panel_columns, ahead);
    }
  }
}

template <class Dot>
void gemm_int4_dyn(const gemm_job& job) {
  job.layout->format.zero_points ? gemm_int4_rows<Dot, true>(job) : gemm_int4_rows<Dot, false>(job);
}
