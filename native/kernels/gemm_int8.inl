// Products of int8 codes: exact integer sums, the same on every instruction set. Needs `dot`, four products added to
// each 32-bit lane, and `gemm.inl`.

// c holds integers until the end of K. Packed rows have `Unit` k of a row together.
template <class Dot, int Unit, int M, int N>
[[gnu::noinline]] void int8_tile(const char* w, const std::uint32_t* a, std::size_t quads, float* c, bool first,
                                 prefetch fetch) {
  typename Dot::i32 acc[M][N];
  KT_UNROLLED (m, M)
    KT_UNROLLED (n, N) acc[m][n] = first ? Dot::zero() : Dot::load(c + m * panel_columns + n * vec::lanes);
  constexpr int at_once = Unit / 4;  // quads
  // The last ones fetch what comes behind them all.
  const std::size_t far = fetch.distance / (4 * panel_columns * at_once) * at_once, last = far < quads ? far : quads;
  std::size_t q = 0;
  for (int part = 0; part < 2; ++part) {
    for (const std::size_t end = part ? quads : quads - last; q < end; q += at_once) {
      for (int i = 0; i < at_once; ++i) {
        for (std::size_t line = 0; line < 4 * panel_columns; line += 64) prefetch_l1(w + fetch.distance + line);
        for (int l = 0; l < fetch.lines; ++l, fetch.next += 64) prefetch_l2(fetch.next);
        typename Dot::weights b[N];
        KT_UNROLLED (n, N) b[n] = Dot::prepare(w + n * vec::lanes * 4);
        KT_UNROLLED (m, M) {
          const typename Dot::i32 x = Dot::set1(a[m * at_once + i]);
          KT_UNROLLED (n, N) acc[m][n] = Dot::add(acc[m][n], x, b[n]);
        }
        w += 4 * panel_columns;
      }
      a += M * at_once;
    }
    fetch.distance += static_cast<std::size_t>(fetch.jump);
  }
  KT_UNROLLED (m, M)
    KT_UNROLLED (n, N) Dot::store(c + m * panel_columns + n * vec::lanes, acc[m][n]);
}

template <class Dot, int Unit, int M>
void int8_columns(const char* w, const std::uint32_t* a, std::size_t quads, float* c, bool first, prefetch fetch) {
  constexpr int n = Dot::tile_vectors(M);
  static_assert(column_vectors % n == 0);
  for (int v = 0; v < column_vectors; v += n)
    int8_tile<Dot, Unit, M, n>(w + v * vec::lanes * 4, a, quads, c + v * vec::lanes, first,
                               v == 0 ? fetch : prefetch{fetch.distance, nullptr, 0, 0, fetch.jump});
}

using int8_function = void (*)(const char*, const std::uint32_t*, std::size_t, float*, bool, prefetch);

// c = (sum - column sum) * (scale of the column * scale of the row), in floats. Rows that are stored as code + 128
// have sums that are too large by the column sums.
template <class Dot>
void scale_int8(const gemm_job& job) {
  const panel_layout& l = *job.layout;
  const char* scales = static_cast<const char*>(job.panel) + l.scale_offset(0);
  for (int r = 0; r < job.rows; ++r) {
    const vec::f32 row_scale = vec::set1(job.row_scale[r]);
    for (int v = 0; v < column_vectors; ++v) {
      float* c = job.c + r * panel_columns + v * vec::lanes;
      const vec::f32 scale = vec::load(reinterpret_cast<const float*>(scales) + v * vec::lanes);
      typename Dot::i32 sum = Dot::load(c);
      if constexpr (Dot::unsigned_rows) sum = Dot::sub(sum, Dot::load(scales + (panel_columns + v * vec::lanes) * 4));
      vec::store(c, vec::mul(Dot::to_float(sum), vec::mul(scale, row_scale)));
    }
  }
}

template <class Dot, int Unit>
void gemm_int8_dyn(const gemm_job& job) {
  static constexpr functions_by_rows<int8_function, vec::max_rows> tiles(
      [](auto rows) { return &int8_columns<Dot, Unit, rows()>; });
  const std::size_t quads = (job.k_end - job.k_begin) / 4;
  const char* w = static_cast<const char*>(job.panel) + job.layout->code_offset(job.k_begin);
  const tiling<> cut(job.rows);
  const panel_fetch fetch(job, quads);
  for (int t = 0; t < cut.count; ++t) {
    const std::size_t begin = cut.begin(t), rows = cut.begin(t + 1) - begin;
    const auto* a =
        static_cast<const std::uint32_t*>(job.rows_packed) + (begin * job.layout->k + job.k_begin * rows) / 4;
    tiles[rows](w, a, quads, job.c + begin * panel_columns, job.k_begin == 0, fetch(t));
  }
  if (job.k_end == job.layout->k) scale_int8<Dot>(job);
}
