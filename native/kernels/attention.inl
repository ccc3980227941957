// The products of a tile of keys and values, the merge of splits and what is left to do at the end: kt/attention.h has
// the formulas. Included after attention_weights.inl.

// How pairs of fp32 are multiplied: the weights of a pair are [2][32].
struct fp32_pairs {
  using element = float;
  static constexpr std::size_t pair_bytes = 2 * panel_columns * sizeof(float), lane_bytes = sizeof(float);

  // The next pair of M rows, which lie `stride` elements apart, by N vectors of columns.
  template <int M, int N>
  [[gnu::always_inline]] static void run(vec::f32 (&acc)[M][N], const char* b, const float* a, std::size_t stride) {
    KT_UNROLLED (odd_first, 2) {
      const int k = 1 - odd_first;
      const float* row = reinterpret_cast<const float*>(b) + k * panel_columns;
      multiply_add(
          acc, [=](int m) { return a[m * stride + k]; }, [=](int n) { return vec::load(row + n * vec::lanes); });
    }
  }

  static float number(float x) { return x; }
  // Of position j in a panel of values, from a column on.
  static vec::f32 value(const char* panel, int j, std::size_t column) {
    return vec::load(reinterpret_cast<const float*>(panel) + j * panel_columns + column);
  }
};

template <class Pairs>
struct product_job {
  const char* panel;
  const typename Pairs::element* a;  // row m at m * a_stride
  std::size_t a_stride;
  std::size_t pairs;
  float* c;  // row m at m * c_stride
  std::size_t c_stride;
  const float* factor;  // of each row of c, whose products are added to c * factor; null: to zero
};

// M rows by N vectors of columns.
template <class Pairs, int M, int N>
[[gnu::noinline]] void product(const product_job<Pairs>& job, int column) {
  vec::f32 acc[M][N];
  float* c = job.c + column;
  if (job.factor) {
    KT_UNROLLED (m, M)
      KT_UNROLLED (n, N)
        acc[m][n] = vec::mul(vec::load(c + m * job.c_stride + n * vec::lanes), vec::set1(job.factor[m]));
  } else {
    KT_UNROLLED (m, M)
      KT_UNROLLED (n, N) acc[m][n] = vec::zero();
  }
  const char* b = job.panel + column * Pairs::lane_bytes;
  const typename Pairs::element* a = job.a;
  const std::size_t stride = job.a_stride;
  for (std::size_t p = job.pairs; p; --p) {
    Pairs::run(acc, b, a, stride);
    a += 2;
    b += Pairs::pair_bytes;
  }
  KT_UNROLLED (m, M)
    KT_UNROLLED (n, N) vec::store(c + m * job.c_stride + n * vec::lanes, acc[m][n]);
}

// The columns [0, columns) of a panel, and perhaps some beyond.
template <class Pairs, int M>
void product_columns(const product_job<Pairs>& job, int columns) {
  constexpr int n = vec::tile_vectors(M);
  for (int column = 0; column < panel_columns && column < columns; column += n * vec::lanes)
    product<Pairs, M, n>(job, column);
}

template <class Pairs>
void multiply_rows(int rows, const product_job<Pairs>& job, int columns) {
  static constexpr functions_by_rows<void (*)(const product_job<Pairs>&, int), vec::max_rows> by_rows(
      [](auto m) { return &product_columns<Pairs, m()>; });
  by_rows[rows](job, columns);
}

// What some of its rows see of a tile: [begin, end), of which begin is even; empty where begin >= end.
struct seen {
  int begin = attention_tile, end = 0;
  seen() = default;
  seen(const attend_job& job, int first, int last) {
    for (int r = first; r < last; ++r) {
      const int b = job.begin[r] > 0 ? job.begin[r] : 0, e = job.end[r] < job.count ? job.end[r] : job.count;
      if (b >= e) continue;
      begin = b < begin ? b : begin;
      end = e > end ? e : end;
    }
    begin -= begin % 2;
  }
};

// Fetches the next tile, a few rows at each step.
class tile_fetch {
 public:
  tile_fetch(const attend_job& job, int steps) : next_(job.next), per_step_((count(job) + steps - 1) / steps) {}
  void step() {
    for (int n = 0; n < per_step_ && which_ < kinds; ++n) {
      const fetch_rows& f = next_[which_];
      if (row_ < f.count) {
        const char* row = static_cast<const char*>(f.rows[row_]);
        for (std::size_t at = 0; at < f.bytes; at += 64) prefetch_l2(row + at);
      }
      if (++row_ >= f.count) row_ = 0, ++which_;
    }
  }

 private:
  static constexpr int kinds = sizeof(attend_job::next) / sizeof(fetch_rows);
  static int count(const attend_job& job) {
    int n = 0;
    for (const fetch_rows& f : job.next) n += f.count;
    return n;
  }
  const fetch_rows* next_;
  const int per_step_;
  int which_ = 0, row_ = 0;
};

// The rows of a job in tiles, and what each of these sees.
struct seen_by_tiles {
  const tiling<> cut;
  seen of[(attention_rows + vec::max_rows - 1) / vec::max_rows];
  explicit seen_by_tiles(const attend_job& job) : cut(job.rows) {
    for (int t = 0; t < cut.count; ++t) of[t] = seen(job, cut.begin(t), cut.begin(t + 1));
  }
};

template <class Pairs>
void scores(const attend_job& job, const seen_by_tiles& tiles, tile_fetch& fetch) {
  using element = typename Pairs::element;
  const tiling<>& cut = tiles.cut;
  for (int panel = 0; panel * panel_columns < job.count; ++panel)
    for (int t = 0; t < cut.count; ++t) {
      const int r = cut.begin(t), last = cut.begin(t + 1);
      const int columns = tiles.of[t].end - panel * panel_columns;
      fetch.step();
      if (columns <= 0) continue;
      multiply_rows<Pairs>(last - r,
                           {static_cast<const char*>(job.keys) + panel * (job.size / 2) * Pairs::pair_bytes,
                            static_cast<const element*>(job.queries) + r * job.size, job.size, job.size / 2,
                            job.scores + r * attention_tile + panel * panel_columns, attention_tile, nullptr},
                           columns);
    }
}

// Weights of a row in the room of its scores.
template <class Pairs>
struct row_weights {
  using element = typename Pairs::element;
  static constexpr std::size_t stride = attention_tile * sizeof(float) / sizeof(element);
  static const element* of(const attend_job& job, int r) {
    return reinterpret_cast<const element*>(job.scores) + r * stride;
  }
};

template <class Pairs>
void weighted_values(const attend_job& job, const seen_by_tiles& tiles, const float* factor, tile_fetch& fetch) {
  using weights = row_weights<Pairs>;
  const tiling<>& cut = tiles.cut;
  for (std::size_t column = 0; column < job.columns; column += panel_columns)
    for (int t = 0; t < cut.count; ++t) {
      const int r = cut.begin(t), last = cut.begin(t + 1);
      const seen& s = tiles.of[t];
      fetch.step();
      if (s.begin >= s.end) continue;
      const std::size_t first_pair = (column / panel_columns * attention_tile + static_cast<std::size_t>(s.begin)) / 2;
      multiply_rows<Pairs>(
          last - r,
          {static_cast<const char*>(job.values) + first_pair * Pairs::pair_bytes, weights::of(job, r) + s.begin,
           weights::stride, static_cast<std::size_t>(s.end - s.begin + 1) / 2,
           job.state.out + r * job.state.width + column, job.state.width, factor + r},
          static_cast<int>(job.columns - column < panel_columns ? job.columns - column : panel_columns));
    }
}

// The same without products by zero, which is NaN if the value is infinite or NaN.
template <class Pairs>
void weighted_values_one_by_one(const attend_job& job, const float* factor) {
  for (int r = 0; r < job.rows; ++r) {
    const auto* p = row_weights<Pairs>::of(job, r);
    for (std::size_t c = 0; c < job.columns; c += vec::lanes) {
      float* out = job.state.out + r * job.state.width + c;
      const char* panel =
          static_cast<const char*>(job.values) + c / panel_columns * (attention_tile / 2) * Pairs::pair_bytes;
      vec::f32 sum = vec::mul(vec::load(out), vec::set1(factor[r]));
      for (int j = 0; j < attention_tile; ++j) {
        const int at = j ^ 1;
        const float weight = Pairs::number(p[at]);
        if (weight != 0) sum = vec::fma(vec::set1(weight), Pairs::value(panel, at, c % panel_columns), sum);
      }
      vec::store(out, sum);
    }
  }
}

// Pairs: how pairs of dimensions and of positions are multiplied. Weights: of the type that these take.
template <class Pairs, class Weights>
void attend(const attend_job& job) {
  float factor[attention_rows];
  const int panels = 2 + static_cast<int>((job.columns + panel_columns - 1) / panel_columns);
  const seen_by_tiles tiles(job);
  tile_fetch fetch(job, panels * tiles.cut.count);
  scores<Pairs>(job, tiles, fetch);
  weigh<Weights>(job, job.scores, factor);
  if (job.finite)
    weighted_values<Pairs>(job, tiles, factor, fetch);
  else
    weighted_values_one_by_one<Pairs>(job, factor);
}

void merge_attention(const merge_job& job) {
  for (int r = 0; r < job.rows; ++r) {
    const float a = job.into.max[r], b = job.from.max[r], most = a > b ? a : b;
    const vec::f32 x = vec::set1(power_of_two(a - most)), y = vec::set1(power_of_two(b - most));
    const auto merge = [&](float* into, const float* from, std::size_t size) {
      for (std::size_t i = 0; i < size; i += vec::lanes)
        vec::store(into + i, vec::fma(vec::load(from + i), y, vec::mul(vec::load(into + i), x)));
    };
    merge(job.into.sums + r * attention_sums, job.from.sums + r * attention_sums, attention_sums);
    merge(job.into.out + r * job.into.width, job.from.out + r * job.from.width, job.into.width);
    job.into.max[r] = most;
  }
}

// What a row's values are multiplied by at the end.
inline float share(float max, const float* sums, const float* sink) {
  float sum[attention_sums];
  __builtin_memcpy(sum, sums, sizeof sum);
  for (int n = attention_sums / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) sum[i] += sum[i + n];
  float shrink = 1.0f, total = sum[0];
  if (sink) {
    const vec::f32 t = vec::max(constant(attention_lowest), vec::mul(vec::set1(*sink), constant(log2_e)));
    const vec::f32 whole = vec::round(t);
    float n[vec::lanes], fraction[vec::lanes];
    vec::store(n, whole);
    vec::store(fraction, exp2_fraction(vec::sub(t, whole)));
    const float most = n[0] > max ? n[0] : max;
    shrink = power_of_two(max - most);
    total = total * shrink + fraction[0] * power_of_two(n[0] - most);
  }
  return total == 0 ? 0.0f : shrink / total;
}

void finish_attention(const finish_job& job) {
  for (int r = 0; r < job.rows; ++r) {
    const float* from = job.state.out + r * job.state.width;
    const vec::f32 x =
        vec::set1(share(job.state.max[r], job.state.sums + r * attention_sums, job.sinks ? job.sinks + r : nullptr));
    char* to = static_cast<char*>(job.out[r]);
    const std::size_t size = size_of(job.type);
    for (std::size_t c = 0; c < job.columns; c += vec::lanes) {
      const vec::f32 y = vec::fma(vec::load(from + c), x, vec::zero());  // -0 becomes 0
      alignas(64) char rest[vec::lanes * 4];
      char* at = c + vec::lanes <= job.columns ? to + c * size : rest;
      if (job.type == dtype::f32)
        vec::store(reinterpret_cast<float*>(at), y);
      else if (job.type == dtype::f16)
        vec::store_f16(at, y);
      else
        vec::store_bf16(at, y);
      if (at == rest) __builtin_memcpy(to + c * size, rest, (job.columns - c) * size);
    }
  }
}

constexpr attention_kernels attention_by_fma(void (*attend)(const attend_job&)) {
  return {sizeof(float), 2, unpack_rows, pack_keys, pack_values, attend, merge_attention, finish_attention};
}

constexpr attention_kernels attention = attention_by_fma(attend<fp32_pairs, fp32_weights>);
constexpr attention_kernels attention_rounded = attention_by_fma(attend<fp32_pairs, rounded_weights>);
