// c = rows * panel for one packed panel. Included by each instruction set after its `vec`.

constexpr int column_vectors = panel_columns / vec::lanes;

// Rows are cut into `count` tiles that differ by at most one row, the larger ones first: AMX is configured again where
// the number of rows changes.
template <int max_rows = vec::max_rows>
struct tiling {
  int rows, count;
  explicit tiling(int n, int most = max_rows) : rows(n), count((n + most - 1) / most) {}
  int begin(int tile) const {
    const int larger = rows % count;
    return rows / count * tile + (tile < larger ? tile : larger);
  }
};

inline void prefetch_l1(const char* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const char* p) { __builtin_prefetch(p, 0, 2); }

template <format W>
struct weights {  // fp32 and fp16: [K][32]
  static constexpr std::size_t element = W == format::f32 ? 4 : 2;
  static constexpr std::size_t pair_bytes = 2 * panel_columns * element;
  static vec::f32 even(const char* pair, int v) { return load(pair, v); }
  static vec::f32 odd(const char* pair, int v) { return load(pair + panel_columns * element, v); }

 private:
  static vec::f32 load(const char* row, int v) {
    const char* p = row + v * vec::lanes * element;
    if constexpr (W == format::f32)
      return vec::load(reinterpret_cast<const float*>(p));
    else
      return vec::load_f16(p);
  }
};

template <>
struct weights<format::bf16> {  // [K/2][32][2]
  static constexpr std::size_t pair_bytes = 2 * panel_columns * 2;
  static vec::f32 even(const char* pair, int v) { return vec::bf16_even(pair + v * vec::lanes * 4); }
  static vec::f32 odd(const char* pair, int v) { return vec::bf16_odd(pair + v * vec::lanes * 4); }
};

// The products of one k: a_at(m) of each row by b_at(n) of each vector. The fewer of both are held in registers.
template <int M, int N, class A, class B>
[[gnu::always_inline]] inline void multiply_add(vec::f32 (&acc)[M][N], A a_at, B b_at) {
  vec::f32 x[M], b[N];
  if constexpr (M < N) {
    KT_UNROLLED (m, M) x[m] = vec::set1(a_at(m));
    KT_UNROLLED (n, N) {
      b[n] = b_at(n);
      KT_UNROLLED (m, M) vec::accumulate(acc[m][n], x[m], b[n]);
    }
  } else {
    KT_UNROLLED (n, N) b[n] = b_at(n);
    KT_UNROLLED (m, M) {
      x[m] = vec::set1(a_at(m));
      KT_UNROLLED (n, N) vec::accumulate(acc[m][n], x[m], b[n]);
    }
  }
}

// How one pair of k is multiplied: packed activations of `a_type`, `a_per_row` of them per row and pair.
template <format W>
struct fma_step {
  using a_type = float;
  static constexpr int a_per_row = 2;
  static constexpr std::size_t pair_bytes = weights<W>::pair_bytes;
  static constexpr std::size_t lane_bytes = W == format::f16 ? 2 : 4;
  static constexpr int unpacked_tiles = 2;  // for more, weights are unpacked once into memory
  // Codes of groups up to this long are multiplied by half a tile at a time, so that what the groups add up to stays in
  // registers too, and are unpacked twice.
  static constexpr std::size_t short_group = 0;

  // `stride`: rows that lie beside each other, of which M are multiplied.
  template <int M, int N>
  [[gnu::always_inline]] static void run(vec::f32 (&acc)[M][N], const char* w, const float* a, std::size_t stride = M) {
    multiply_add(acc, [a, stride](int m) { return a[stride + m]; }, [w](int n) { return weights<W>::odd(w, n); });
    multiply_add(acc, [a](int m) { return a[m]; }, [w](int n) { return weights<W>::even(w, n); });
  }
};

// What happens to the sums of a tile before and after its pairs.
struct carried {  // c goes on, and is multiplied by `scale` at the end of K unless that is null
  bool first;     // c is not read
  const float* scale;
};
struct grouped {  // c += scale * sum for each of `groups` groups
  std::size_t groups;
  const float* scale;  // [groups][32]
};

// What is fetched while a tile runs: its own weights `distance` bytes ahead, in two steps where `near` is not 0, and
// `lines` of the panel to come for each pair or quad of k. `jump`: from the end of its weights to where they go on.
struct prefetch {
  std::size_t distance = 0;
  const char* next = nullptr;
  int lines = 0;
  std::size_t near = 0;
  std::ptrdiff_t jump = 0;
};

[[gnu::always_inline]] inline void fetch_ahead(const char* w, const prefetch& fetch) {
  if (!fetch.near) return prefetch_l1(w + fetch.distance);
  prefetch_l2(w + fetch.distance);
  prefetch_l1(w + fetch.near);
}

template <class Step, bool Stream, int M, int N>
[[gnu::always_inline]] inline void sum_pairs(vec::f32 (&acc)[M][N], const char*& w, const typename Step::a_type*& a,
                                             std::size_t pairs, prefetch& fetch) {
  // The last pairs fetch what comes behind them all.
  constexpr int parts = Stream ? 2 : 1;
  const std::size_t last =
      Stream && fetch.distance / Step::pair_bytes < pairs ? fetch.distance / Step::pair_bytes : pairs;
  std::size_t p = 0;
  for (int part = 1; part <= parts; ++part) {
    for (const std::size_t end = part == parts ? pairs : pairs - last; p < end; ++p) {
      if constexpr (Stream)
        for (std::size_t row = 0; row < Step::pair_bytes; row += panel_columns * Step::lane_bytes)
          for (std::size_t line = 0; line < N * vec::lanes * Step::lane_bytes; line += 64)
            fetch_ahead(w + row + line, fetch);
      for (int i = 0; i < fetch.lines; ++i, fetch.next += 64) prefetch_l2(fetch.next);
      Step::run(acc, w, a);
      a += Step::a_per_row * M;
      w += Step::pair_bytes;
    }
    if constexpr (Stream) fetch.distance += static_cast<std::size_t>(fetch.jump);
  }
}

// M rows by N vectors of columns, kept in registers over all pairs. `Stream`: w comes from memory.
template <class Step, bool Stream, int M, int N>
[[gnu::noinline]] void tile(const char* w, const typename Step::a_type* a, std::size_t pairs, float* c, int column,
                            prefetch& ahead, const carried& job) {
  prefetch fetch = ahead;
  vec::f32 acc[M][N];
  KT_UNROLLED (m, M)
    KT_UNROLLED (n, N) acc[m][n] = job.first ? vec::zero() : vec::load(c + m * panel_columns + n * vec::lanes);
  sum_pairs<Step, Stream>(acc, w, a, pairs, fetch);
  ahead.next = fetch.next;
  if (job.scale) {
    KT_UNROLLED (n, N) {
      const vec::f32 scale = vec::load(job.scale + column + n * vec::lanes);
      KT_UNROLLED (m, M) acc[m][n] = vec::mul(acc[m][n], scale);
    }
  }
  KT_UNROLLED (m, M)
    KT_UNROLLED (n, N) vec::store(c + m * panel_columns + n * vec::lanes, acc[m][n]);
}

template <class Step, bool Stream, int M, int N>
[[gnu::noinline]] void tile(const char* w, const typename Step::a_type* a, std::size_t pairs, float* c, int column,
                            prefetch& ahead, const grouped& job) {
  prefetch fetch = ahead;
  for (std::size_t g = 0; g < job.groups; ++g) {
    vec::f32 acc[M][N];
    KT_UNROLLED (m, M)
      KT_UNROLLED (n, N) acc[m][n] = vec::zero();
    sum_pairs<Step, Stream>(acc, w, a, pairs, fetch);
    asm volatile("" ::: "memory");  // or gcc keeps c on the stack, and copies it there and back
    KT_UNROLLED (n, N) {
      const vec::f32 scale = vec::load(job.scale + g * panel_columns + column + n * vec::lanes);
      KT_UNROLLED (m, M) {
        float* to = c + m * panel_columns + n * vec::lanes;
        vec::store(to, vec::fma(scale, acc[m][n], vec::load(to)));
      }
    }
  }
  ahead.next = fetch.next;
}

// All 32 columns of M rows, in as many passes as the registers ask for. Each pass fetches its part of the lines.
template <class Step, bool Stream, class Job, int M>
void tile_columns(const char* w, const typename Step::a_type* a, std::size_t pairs, float* c, prefetch fetch,
                  const Job& job) {
  constexpr int n = vec::tile_vectors(M);
  static_assert(column_vectors % n == 0);
  constexpr int passes = column_vectors / n;
  const int lines = fetch.lines;
  for (int pass = 0; pass < passes; ++pass) {
    const int v = pass * n;
    fetch.lines = lines * (pass + 1) / passes - lines * pass / passes;
    tile<Step, Stream, M, n>(w + v * vec::lanes * Step::lane_bytes, a, pairs, c + v * vec::lanes, v * vec::lanes, fetch,
                             job);
  }
}

// Functions by number of rows, 1 to `most`, each made by `make` from that number as a compile-time constant.
template <class Function, int most>
class functions_by_rows {
 public:
  template <class Make>
  constexpr explicit functions_by_rows(Make make) : by_rows_() {
    fill<most>(make);
  }
  Function operator[](std::size_t rows) const { return by_rows_[rows - 1]; }

 private:
  template <int M, class Make>
  constexpr void fill(Make make) {
    if constexpr (M > 0) {
      by_rows_[M - 1] = make(std::integral_constant<int, M>{});
      fill<M - 1>(make);
    }
  }
  Function by_rows_[most + 1];  // `most` may be 0
};

template <class Step, class Job>
using tile_function = void (*)(const char*, const typename Step::a_type*, std::size_t, float*, prefetch, const Job&);

// All rows of a job times the pairs at `w`, which begin at k.
template <class Step, bool Stream, class Job, class Fetch>
void tile_rows(const gemm_job& job, const char* w, std::size_t k, std::size_t pairs, const Job& what, Fetch fetch) {
  static constexpr functions_by_rows<tile_function<Step, Job>, vec::max_rows> tiles(
      [](auto rows) { return &tile_columns<Step, Stream, Job, rows()>; });
  const tiling<> cut(job.rows);
  const auto* a = static_cast<const typename Step::a_type*>(job.rows_packed);
  for (int t = 0; t < cut.count; ++t) {
    const std::size_t begin = cut.begin(t), rows = cut.begin(t + 1) - begin;
    const auto* tile = a + (begin * job.layout->k + k * rows) / 2 * Step::a_per_row;
    tiles[rows](w, tile, pairs, job.c + begin * panel_columns, fetch(t), what);
  }
}

// What a part of a panel takes in memory.
inline std::size_t part_bytes(const gemm_job& job) {
  const panel_layout& l = *job.layout;
  return (job.k_end < l.k ? l.code_offset(job.k_end) : l.bytes()) - l.code_offset(job.k_begin);
}

// One panel after the other.
template <void (*Gemm)(const gemm_job&)>
void each_panel(const gemm_job& job) {
  gemm_job one = job;
  one.panels = 1;
  const std::size_t bytes = job.layout->bytes();
  for (int p = 0; p < job.panels; ++p) {
    one.panel = static_cast<const char*>(job.panel) + p * bytes;
    one.c = job.c + static_cast<std::size_t>(p) * job.rows * panel_columns;
    if (job.next) one.next = static_cast<const char*>(job.next) + p * bytes;
    one.onward = p + 1 < job.panels ? nullptr : job.onward;
    Gemm(one);
  }
}

// What each tile of a job of `steps` fetches: the next panel comes during the first tile, or half each during the first
// two.
class panel_fetch {
 public:
  panel_fetch(const gemm_job& job, std::size_t steps) : job_(job), steps_(steps) {
    const std::size_t lines = job.next ? (part_bytes(job) / 64 + steps - 1) / steps : 0;
    per_step_ = static_cast<int>(job.rows > vec::max_rows ? (lines + 1) / 2 : lines);
    if (job.onward) {
      const std::size_t end = job.layout->code_offset(job.k_begin) + part_bytes(job);
      jump_ = static_cast<const char*>(job.onward) - (static_cast<const char*>(job.panel) + end);
    }
  }
  prefetch operator()(int tile) const {
    if (tile > 1 || !job_.next) return {job_.distance, nullptr, 0, job_.near, jump_};
    return {job_.distance, static_cast<const char*>(job_.next) + tile * steps_ * per_step_ * 64, per_step_, job_.near,
            jump_};
  }

 private:
  const gemm_job& job_;
  const std::size_t steps_;
  int per_step_;
  std::ptrdiff_t jump_ = 0;
};

// Weights that are multiplied as they lie.
template <class Step>
void gemm(const gemm_job& job) {
  const std::size_t pairs = (job.k_end - job.k_begin) / 2;
  const panel_fetch fetch(job, pairs);
  tile_rows<Step, true>(job, static_cast<const char*>(job.panel) + job.layout->code_offset(job.k_begin), job.k_begin,
                        pairs, carried{job.k_begin == 0, nullptr}, fetch);
}
