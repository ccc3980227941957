// c = rows * panel for one packed panel. Included by each instruction set after its `vec`.

constexpr int column_vectors = panel_columns / vec::lanes;

// Rows are cut into `count` tiles that differ by at most one row.
struct tiling {
  int rows, count;
  explicit tiling(int n) : rows(n), count((n + vec::max_rows - 1) / vec::max_rows) {}
  int begin(int tile) const { return static_cast<int>(static_cast<long>(rows) * tile / count); }
};

inline void prefetch_l1(const char* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const char* p) { __builtin_prefetch(p, 0, 2); }
constexpr std::size_t l1_distance = 1024;

template <dtype W>
struct weights {  // fp32 and fp16: [K][32]
  static constexpr std::size_t element = size_of(W);
  static constexpr std::size_t pair_bytes = 2 * panel_columns * element;
  static vec::f32 even(const char* pair, int v) { return load(pair, v); }
  static vec::f32 odd(const char* pair, int v) { return load(pair + panel_columns * element, v); }

 private:
  static vec::f32 load(const char* row, int v) {
    const char* p = row + v * vec::lanes * element;
    if constexpr (W == dtype::f32)
      return vec::load(reinterpret_cast<const float*>(p));
    else
      return vec::load_f16(p);
  }
};

template <>
struct weights<dtype::bf16> {  // [K/2][32][2]
  static constexpr std::size_t pair_bytes = 2 * panel_columns * 2;
  static vec::f32 even(const char* pair, int v) { return vec::bf16_even(pair + v * vec::lanes * 4); }
  static vec::f32 odd(const char* pair, int v) { return vec::bf16_odd(pair + v * vec::lanes * 4); }
};

// How one pair of k is multiplied: packed activations of `a_type`, `a_per_row` of them per row and pair.
template <dtype W>
struct fma_step {
  using a_type = float;
  static constexpr int a_per_row = 2;
  static constexpr std::size_t pair_bytes = weights<W>::pair_bytes;
  static constexpr std::size_t lane_bytes = W == dtype::f16 ? 2 : 4;

  template <int M, int N>
  [[gnu::always_inline]] static void run(vec::f32 (&acc)[M][N], const char* w, const float* a) {
    vec::f32 b[N];
    KT_UNROLLED (n, N) b[n] = weights<W>::odd(w, n);
    multiply(acc, b, a + M);
    KT_UNROLLED (n, N) b[n] = weights<W>::even(w, n);
    multiply(acc, b, a);
  }

 private:
  template <int M, int N>
  [[gnu::always_inline]] static void multiply(vec::f32 (&acc)[M][N], const vec::f32 (&b)[N], const float* a) {
    KT_UNROLLED (m, M) {
      const vec::f32 x = vec::set1(a[m]);
      KT_UNROLLED (n, N) acc[m][n] = vec::fma(x, b[n], acc[m][n]);
    }
  }
};

// M rows by N vectors of columns, kept in registers over all of K.
template <class Step, int M, int N>
[[gnu::noinline]] void tile(const char* w, const typename Step::a_type* a, std::size_t pairs, float* c,
                            const char* next, int lines) {
  vec::f32 acc[M][N];
  KT_UNROLLED (m, M)
    KT_UNROLLED (n, N) acc[m][n] = vec::zero();
  for (std::size_t p = 0; p < pairs; ++p) {
    for (std::size_t line = 0; line < Step::pair_bytes; line += 64) prefetch_l1(w + l1_distance + line);
    Step::run(acc, w, a);
    a += Step::a_per_row * M;
    w += Step::pair_bytes;
    for (int i = 0; i < lines; ++i, next += 64) prefetch_l2(next);
  }
  KT_UNROLLED (m, M)
    KT_UNROLLED (n, N) vec::store(c + m * panel_columns + n * vec::lanes, acc[m][n]);
}

// All 32 columns of M rows, in as many passes as the registers ask for.
template <class Step, int M>
void tile_columns(const char* w, const typename Step::a_type* a, std::size_t pairs, float* c, const char* next,
                  int lines) {
  constexpr int n = vec::tile_vectors(M);
  static_assert(column_vectors % n == 0);
  for (int v = 0; v < column_vectors; v += n)
    tile<Step, M, n>(w + v * vec::lanes * Step::lane_bytes, a, pairs, c + v * vec::lanes, next, v == 0 ? lines : 0);
}

template <class Step, int M = vec::max_rows>
void tile_rows(int rows, const char* w, const typename Step::a_type* a, std::size_t pairs, float* c, const char* next,
               int lines) {
  if constexpr (M > 0) {
    if (rows == M) return tile_columns<Step, M>(w, a, pairs, c, next, lines);
    tile_rows<Step, M - 1>(rows, w, a, pairs, c, next, lines);
  }
}

// The next panel is fetched during the first tile, or half each during the first two.
struct prefetch_plan {
  const char* next;
  std::size_t lines, half;
  int per_pair;
  prefetch_plan(const gemm_job& job, int tiles) : next(static_cast<const char*>(job.next_panel)) {
    const std::size_t pairs = job.k / 2;
    lines = next && pairs ? job.panel_bytes / 64 / pairs : 0;  // whole panel, per pair
    per_pair = static_cast<int>(tiles > 1 ? (lines + 1) / 2 : lines);
    half = pairs * per_pair * 64;
  }
  int count(int tile) const { return tile < 2 && next ? per_pair : 0; }
  const char* at(int tile) const { return tile == 0 ? next : next + half; }
};

template <class Step>
void gemm(const gemm_job& job) {
  const tiling tiles(job.rows);
  const prefetch_plan fetch(job, tiles.count);
  const auto* a = static_cast<const typename Step::a_type*>(job.rows_packed);
  const std::size_t pairs = job.k / 2;
  for (int t = 0; t < tiles.count; ++t) {
    const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
    tile_rows<Step>(rows, static_cast<const char*>(job.panel), a + begin * pairs * Step::a_per_row, pairs,
                    job.c + begin * panel_columns, fetch.at(t), fetch.count(t));
  }
}
