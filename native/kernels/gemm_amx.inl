// Products of packed rows and one packed panel of weights on tiles. Included after tile_hw.h or tile_emu.h.
//
// Order of summation. bf16: k in blocks of 32 (one tile instruction), ascending; in a block the 16 even and the 16 odd
// products are summed apart, ascending, by fused multiply-adds that start at zero; then c = c + (even + odd), two
// roundings. Denormals are zero, before and after each operation. int8: exact modulo 2^32.
// The bits of a row depend neither on the other rows nor, as c is carried in full, on where k is cut.

// Weights: 32 columns for k in [k_begin, k_end): bf16 [K/2][32][2], int8 [K/4][32][4]; either way a tile of weights is
// 16 rows of 64 bytes, 128 bytes apart. Rows: cut into near-equal tiles of at most 16, the larger ones first; tile t
// begins at element begin(t) * k and is [k/U][rows of the tile][U], 64 bytes in U. bf16: U = 32. uint8: U = 64.
struct tile_gemm {
  const char* w;
  const void* rows_packed;
  int rows;
  std::size_t k, k_begin, k_end;  // multiples of U
  void* c;                        // [rows][32] fp32 or int32
  bool first;                     // c is overwritten; else added to
  bool near = false;              // `w` is in the first-level cache
  const char* next = nullptr;     // what is fetched into the second level meanwhile; null: nothing
  std::size_t next_bytes = 0;
};

// Tiles for as long as they stay in use: configured at the first product, again only for other numbers of rows.
// Released at the end, since what is left in tiles is saved at every switch of threads and keeps the core out of deep
// sleep. One at a time per thread, and no foreign code meanwhile: it may configure tiles as well.
class tile_session {
 public:
  tile_session() = default;
  tile_session(const tile_session&) = delete;
  tile_session& operator=(const tile_session&) = delete;
  ~tile_session() {
    if (rows0_ != 0) tiles::release();
  }

  // Tiles 0 and 1: sums of `rows0` rows, columns [0, 16) and [16, 32); 2 and 3: of `rows1` rows, if any; 4 and 5: the
  // rows; 6 and 7: weights. Contents are lost if the numbers of rows change.
  void configure(int rows0, int rows1) {
    if (rows0 == rows0_ && (rows1 == rows1_ || rows1 == 0)) return;
    rows0_ = rows0;
    rows1_ = rows1;
    const int rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, 16, 16};
    tile_config config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = static_cast<std::uint8_t>(rows[t]);
      config.colsb[t] = rows[t] == 0 ? 0 : 64;
    }
    tiles::load_config(config);
  }

 private:
  int rows0_ = 0, rows1_ = 0;
};

struct tile_dot_bf16 {
  static constexpr std::size_t bytes = 2;
  template <int c, int a, int b>
  static void add() {
    tiles::dpbf16<c, a, b>();
  }
};

struct tile_dot_int8 {
  static constexpr std::size_t bytes = 1;
  template <int c, int a, int b>
  static void add() {
    tiles::dpbusd<c, a, b>();
  }
};

// One tile of rows, or of sums of these rows.
struct tile_of_rows {
  const char* packed;  // at k_begin
  std::size_t step;    // bytes to the next U of k
  char* c;
};

template <int low, int high>
void load_sums(const char* c, bool first) {
  if (first) {
    tiles::zero<low>();
    tiles::zero<high>();
  } else {
    tiles::load<low>(c, 128);
    tiles::load<high>(c + 64, 128);
  }
}

template <int low, int high>
void store_sums(char* c) {
  tiles::store<low>(c, 128);
  tiles::store<high>(c + 64, 128);
}

// Memory that is fetched a few lines at a time.
class line_fetch {
 public:
  line_fetch(const char* begin, std::size_t bytes, std::size_t times)
      : at_(begin), end_(begin + bytes), step_((bytes / 64 + times - 1) / times * 64) {}
  void step() {
    const char* to = end_ - at_ < static_cast<std::ptrdiff_t>(step_) ? end_ : at_ + step_;
    for (; at_ < to; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  std::size_t step_;
};

// Half of the weights of a step, two steps ahead. At the 10 GB/s that a core gets from memory, a step takes 200 ns:
// more than a miss. Not all at once, to leave room for the loads between.
inline void prefetch_half_step(const char* w) {
  KT_UNROLLED (line, 16) __builtin_prefetch(w + 2 * 2048 + line * 64, 0, 3);
}

// All 32 columns of N tiles of rows, one or two. A load and the products that wait for it stand apart from the next.
// `Stream`: weights come from farther than the first-level cache.
template <class Dot, int N, bool Stream>
void multiply_tiles(const char* w, std::size_t steps, tile_of_rows t0, tile_of_rows t1, bool first, line_fetch& fetch) {
  load_sums<0, 1>(t0.c, first);
  if constexpr (N == 2) load_sums<2, 3>(t1.c, first);
  for (; steps > 0; --steps, w += 2048) {
    if constexpr (Stream)
      prefetch_half_step(w);
    else
      fetch.step();
    tiles::load<6>(w, 128);
    tiles::load<4>(t0.packed, 64);
    Dot::template add<0, 4, 6>();
    if constexpr (Stream) prefetch_half_step(w + 1024);
    tiles::load<7>(w + 64, 128);
    Dot::template add<1, 4, 7>();
    t0.packed += t0.step;
    if constexpr (N == 2) {
      tiles::load<5>(t1.packed, 64);
      Dot::template add<2, 5, 6>();
      Dot::template add<3, 5, 7>();
      t1.packed += t1.step;
    }
  }
  store_sums<0, 1>(t0.c);
  if constexpr (N == 2) store_sums<2, 3>(t1.c);
}

// As many steps of weights as stay in the first-level cache, of 48 KB, while all rows are multiplied with them.
constexpr std::size_t steps_in_cache = 16;

template <class Dot>
void tile_gemm_over(tile_session& session, const tile_gemm& job) {
  if (job.rows == 0) return;
  const int count = (job.rows + 15) / 16, larger = job.rows % count;
  const std::size_t steps = (job.k_end - job.k_begin) * Dot::bytes / 64;
  const auto begin = [=](int t) { return static_cast<std::size_t>(job.rows / count * t + (t < larger ? t : larger)); };
  const auto size = [=](int t) { return t < count ? job.rows / count + (t < larger) : 0; };
  const auto tile = [&](int t, std::size_t step) {
    const char* packed = static_cast<const char*>(job.rows_packed);
    packed += (begin(t) * job.k + size(t) * job.k_begin) * Dot::bytes + size(t) * step * 64;
    return tile_of_rows{packed, size(t) * std::size_t{64}, static_cast<char*>(job.c) + begin(t) * 128};
  };
  // One pass over the weights for one or two tiles of rows. With more of them weights would come from the second level
  // again for each two, which cannot give them as fast as they are multiplied.
  const bool stream = count <= 2 && !job.near;
  const std::size_t part = count <= 2 || job.near ? steps : steps_in_cache;
  line_fetch fetch(job.next, job.next ? job.next_bytes : 0, stream || !steps ? 1 : steps * ((count + 1) / 2));
  if (stream) fetch.step();
  std::size_t s = 0;
  do {
    const std::size_t some = steps - s < part ? steps - s : part;
    const char* w = job.w + s * 2048;
    const bool first = job.first && s == 0;
    for (int t = 0; t < count; t += 2) {
      session.configure(size(t), size(t + 1));
      const tile_of_rows t0 = tile(t, s), t1 = t + 1 < count ? tile(t + 1, s) : tile_of_rows{};
      if (t + 1 == count)
        stream ? multiply_tiles<Dot, 1, true>(w, some, t0, t1, first, fetch)
               : multiply_tiles<Dot, 1, false>(w, some, t0, t1, first, fetch);
      else
        stream ? multiply_tiles<Dot, 2, true>(w, some, t0, t1, first, fetch)
               : multiply_tiles<Dot, 2, false>(w, some, t0, t1, first, fetch);
    }
  } while ((s += part) < steps);
}

inline void tile_gemm_bf16(tile_session& session, const tile_gemm& job) { tile_gemm_over<tile_dot_bf16>(session, job); }
inline void tile_gemm_int8(tile_session& session, const tile_gemm& job) { tile_gemm_over<tile_dot_int8>(session, job); }

// With tiles of their own. Configuring and releasing is little beside a panel, and much beside one or two U of k.
inline void tile_gemm_bf16(const tile_gemm& job) {
  tile_session session;
  tile_gemm_bf16(session, job);
}

inline void tile_gemm_int8(const tile_gemm& job) {
  tile_session session;
  tile_gemm_int8(session, job);
}
