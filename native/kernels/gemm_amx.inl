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

// One tile of rows, and their sums. All in bytes.
struct tile_of_rows {
  const char* a;         // at k_begin
  std::size_t a_stride;  // from row to row
  std::size_t step;      // to the next 64 bytes of each row
  char* c;
  std::size_t c_stride;
};

template <int low, int high>
void load_sums(const tile_of_rows& t, bool first) {
  if (first) {
    tiles::zero<low>();
    tiles::zero<high>();
  } else {
    tiles::load<low>(t.c, t.c_stride);
    tiles::load<high>(t.c + 64, t.c_stride);
  }
}

template <int low, int high>
void store_sums(const tile_of_rows& t) {
  tiles::store<low>(t.c, t.c_stride);
  tiles::store<high>(t.c + 64, t.c_stride);
}

// Memory that is fetched a few lines at a time: all of a panel at once keeps loads waiting, since a core asks for 16
// lines at a time. One to 16 rows of linear and MoE layers are 1.2 to 1.5 times as fast on Emerald Rapids.
class line_fetch {
 public:
  line_fetch() : at_(nullptr), end_(nullptr), step_(0) {}
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

// All 32 columns of N tiles of rows, one or two. First all loads of a step, then its products: on Emerald Rapids loads
// of tiles and products do not overlap, and each change from one to the other waits for what is under way (a step of
// two by two takes 4.2 times as long as its products alone, 4.5 with a load before each product).
template <class Dot, int N>
void multiply_tiles(const char* w, std::size_t steps, tile_of_rows t0, tile_of_rows t1, bool first, line_fetch& fetch) {
  load_sums<0, 1>(t0, first);
  if constexpr (N == 2) load_sums<2, 3>(t1, first);
  for (; steps > 0; --steps, w += 2048) {
    fetch.step();
    tiles::load<6>(w, 128);
    tiles::load<4>(t0.a, t0.a_stride);
    tiles::load<7>(w + 64, 128);
    if constexpr (N == 2) tiles::load<5>(t1.a, t1.a_stride);
    Dot::template add<0, 4, 6>();
    Dot::template add<1, 4, 7>();
    t0.a += t0.step;
    if constexpr (N == 2) {
      Dot::template add<2, 5, 6>();
      Dot::template add<3, 5, 7>();
      t1.a += t1.step;
    }
  }
  store_sums<0, 1>(t0);
  if constexpr (N == 2) store_sums<2, 3>(t1);
}

template <class Dot>
void tile_gemm_over(tile_session& session, const tile_gemm& job) {
  if (job.rows == 0) return;
  const int count = (job.rows + 15) / 16, larger = job.rows % count;
  const std::size_t steps = (job.k_end - job.k_begin) * Dot::bytes / 64;
  const auto begin = [=](int t) { return static_cast<std::size_t>(job.rows / count * t + (t < larger ? t : larger)); };
  const auto size = [=](int t) { return t < count ? job.rows / count + (t < larger) : 0; };
  const auto tile = [&](int t) {
    const char* packed = static_cast<const char*>(job.rows_packed);
    packed += (begin(t) * job.k + size(t) * job.k_begin) * Dot::bytes;
    return tile_of_rows{packed, 64, size(t) * std::size_t{64}, static_cast<char*>(job.c) + begin(t) * 128, 128};
  };
  line_fetch fetch(job.next, job.next ? job.next_bytes : 0, steps ? steps * ((count + 1) / 2) : 1);
  for (int t = 0; t < count; t += 2) {
    session.configure(size(t), size(t + 1));
    if (t + 1 < count)
      multiply_tiles<Dot, 2>(job.w, steps, tile(t), tile(t + 1), job.first, fetch);
    else
      multiply_tiles<Dot, 1>(job.w, steps, tile(t), {}, job.first, fetch);
  }
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
