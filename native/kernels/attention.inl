// One tile of keys and values, the merge of splits and what is left to do at the end: kt/attention.h has the formulas.

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

// A row of a mask as numbers to add.
class mask_row {
 public:
  const float* operator()(const attend_job& job, int r) {
    if (job.mask == mask_type::none) return nullptr;
    if (job.mask_rows[r] == from_) return values_;
    from_ = job.mask_rows[r];
    if (job.mask == mask_type::boolean) {
      const auto* allowed = static_cast<const unsigned char*>(from_);
      for (int j = 0; j < job.count; ++j) values_[j] = allowed[j] ? 0.0f : -__builtin_inff();
      return values_;
    }
    const dtype type = job.mask == mask_type::f32 ? dtype::f32 : job.mask == mask_type::f16 ? dtype::f16 : dtype::bf16;
    with_type(type, [&](auto t) {
      for (int j = 0; j < attention_tile; j += vec::lanes) vec::store(values_ + j, load_part<t()>(from_, j, job.count));
    });
    return values_;
  }

 private:
  const void* from_ = nullptr;
  alignas(64) float values_[attention_tile] = {};
};

template <class V>
float largest(V x) {
  constexpr int lanes = sizeof(V) / 4;
  if constexpr (lanes > 8) x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(8)));
  if constexpr (lanes > 1) {
    x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(4)));
    x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(2)));
    x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(1)));
    return x[0];
  } else {
    return x;
  }
}

struct alignas(64) places_of_tile {
  float at[attention_tile] = {};
  constexpr places_of_tile() {
    for (int i = 0; i < attention_tile; ++i) at[i] = static_cast<float>(i);
  }
};
inline constexpr places_of_tile places;

// Turns products into scores, and returns the largest of them and `most`.
float finish_scores(const attend_job& job, int r, const float* mask, float most) {
  float* row = job.scores + r * attention_tile;
  const int begin = job.begin[r], end = job.end[r] < job.count ? job.end[r] : job.count;
  const bool whole = begin <= 0 && end == attention_tile;
  const vec::f32 first = vec::set1(static_cast<float>(begin)), last = vec::set1(static_cast<float>(end - 1));
  const vec::f32 none = vec::set1(-__builtin_inff()), scale = vec::set1(job.scale);
  const vec::f32 cap = vec::set1(job.softcap), per_cap = vec::set1(job.softcap > 0 ? 1.0f / job.softcap : 0.0f);
  vec::f32 top = vec::set1(most);
  KT_UNROLLED (j, attention_tile / vec::lanes) {
    vec::f32 s = vec::mul(vec::load(row + j * vec::lanes), scale);
    if (job.softcap > 0) s = vec::mul(tanh(vec::mul(s, per_cap)), cap);
    if (mask) {
      const vec::f32 m = vec::load(mask + j * vec::lanes);
      s = vec::select_negative(vec::sub(m, vec::set1(attention_lowest)), none, vec::add(s, m));
    }
    if (!whole) {
      const vec::f32 place = vec::load(places.at + j * vec::lanes);
      s = vec::select_negative(vec::sub(place, first), none, vec::select_negative(vec::sub(last, place), none, s));
    }
    vec::store(row + j * vec::lanes, s);
    top = vec::max(s, top);  // the second operand where a score is NaN
  }
  return largest(top);
}

// e^(from - to) of each row.
void factors(const float* from, const float* to, int rows, float* result) {
  for (int r = 0; r < rows; r += vec::lanes) {
    float a[vec::lanes] = {}, b[vec::lanes] = {};
    const int n = rows - r < vec::lanes ? rows - r : vec::lanes;
    for (int i = 0; i < n; ++i) a[i] = from[r + i], b[i] = to[r + i];
    vec::store(a, exp_up_to_one(vec::sub(vec::load(a), vec::load(b))));
    for (int i = 0; i < n; ++i) result[r + i] = a[i];
  }
}

// Scores become weights; `factor`: by what all that is summed up shrinks. keep(r, j, p) takes the weights p of row r
// from position j on, and returns what is summed up.
template <class Keep>
void weigh(const attend_job& job, float* factor, Keep keep) {
  float most[attention_rows];
  mask_row mask;
  for (int r = 0; r < job.rows; ++r) most[r] = finish_scores(job, r, mask(job, r), job.state.max[r]);
  factors(job.state.max, most, job.rows, factor);
  constexpr int vectors = attention_sums / vec::lanes;
  for (int r = 0; r < job.rows; ++r) {
    const float* row = job.scores + r * attention_tile;
    float* sums = job.state.sums + r * attention_sums;
    const vec::f32 m = vec::set1(most[r]), f = vec::set1(factor[r]);
    job.state.max[r] = most[r];
    KT_UNROLLED (v, vectors) {
      vec::f32 sum = vec::mul(vec::load(sums + v * vec::lanes), f);
      KT_UNROLLED (i, attention_tile / attention_sums) {
        const int j = i * attention_sums + v * vec::lanes;
        sum = vec::add(sum, keep(r, j, exp_up_to_one(vec::sub(vec::load(row + j), m))));
      }
      vec::store(sums + v * vec::lanes, sum);
    }
  }
}

void weighted_values(const attend_job& job, const seen_by_tiles& tiles, const float* factor, tile_fetch& fetch) {
  const tiling<>& cut = tiles.cut;
  for (std::size_t column = 0; column < job.columns; column += panel_columns)
    for (int t = 0; t < cut.count; ++t) {
      const int r = cut.begin(t), last = cut.begin(t + 1);
      const seen& s = tiles.of[t];
      fetch.step();
      if (s.begin >= s.end) continue;
      const std::size_t first = column * attention_tile + static_cast<std::size_t>(s.begin) * panel_columns;
      multiply_rows<fp32_pairs>(
          last - r,
          {static_cast<const char*>(job.values) + first * sizeof(float), job.scores + r * attention_tile + s.begin,
           attention_tile, static_cast<std::size_t>(s.end - s.begin + 1) / 2,
           job.state.out + r * job.state.width + column, job.state.width, factor + r},
          static_cast<int>(job.columns - column < panel_columns ? job.columns - column : panel_columns));
    }
}

// The same without products by zero, which is NaN if the value is infinite or NaN.
void weighted_values_one_by_one(const attend_job& job, const float* factor) {
  for (int r = 0; r < job.rows; ++r) {
    const float* p = job.scores + r * attention_tile;
    for (std::size_t c = 0; c < job.columns; c += vec::lanes) {
      float* out = job.state.out + r * job.state.width + c;
      const float* v = static_cast<const float*>(job.values) + c / panel_columns * attention_tile * panel_columns +
                       c % panel_columns;
      vec::f32 sum = vec::mul(vec::load(out), vec::set1(factor[r]));
      for (int j = 0; j < attention_tile; ++j) {
        const int at = j ^ 1;
        if (p[at] != 0) sum = vec::fma(vec::set1(p[at]), vec::load(v + at * panel_columns), sum);
      }
      vec::store(out, sum);
    }
  }
}

// Keys: how pairs of dimensions of queries and keys are multiplied. Values are in fp32.
template <class Keys>
void attend(const attend_job& job) {
  float factor[attention_rows];
  const int panels = 2 + static_cast<int>((job.columns + panel_columns - 1) / panel_columns);
  const seen_by_tiles tiles(job);
  tile_fetch fetch(job, panels * tiles.cut.count);
  scores<Keys>(job, tiles, fetch);
  weigh(job, factor, [&](int r, int j, vec::f32 p) {
    vec::store(job.scores + r * attention_tile + j, p);
    return p;
  });
  if (job.finite)
    weighted_values(job, tiles, factor, fetch);
  else
    weighted_values_one_by_one(job, factor);
}

void merge_attention(const merge_job& job) {
  float most[attention_rows], a[attention_rows], b[attention_rows];
  for (int r = 0; r < job.rows; ++r) most[r] = job.from.max[r] > job.into.max[r] ? job.from.max[r] : job.into.max[r];
  factors(job.into.max, most, job.rows, a);
  factors(job.from.max, most, job.rows, b);
  for (int r = 0; r < job.rows; ++r) {
    const vec::f32 x = vec::set1(a[r]), y = vec::set1(b[r]);
    const auto merge = [&](float* into, const float* from, std::size_t size) {
      for (std::size_t i = 0; i < size; i += vec::lanes)
        vec::store(into + i, vec::fma(vec::load(from + i), y, vec::mul(vec::load(into + i), x)));
    };
    merge(job.into.sums + r * attention_sums, job.from.sums + r * attention_sums, attention_sums);
    merge(job.into.out + r * job.into.width, job.from.out + r * job.from.width, job.into.width);
    job.into.max[r] = most[r];
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
    const float most = *sink > max ? *sink : max;
    float both[2];
    const float* of[] = {&max, sink};
    for (int i = 0; i < 2; ++i) factors(of[i], &most, 1, both + i);
    shrink = both[0];
    total = total * shrink + both[1];
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

constexpr attention_kernels attention = {sizeof(float),      sizeof(float),   2,
                                         unpack_rows,        pack_keys,       pack_values,
                                         attend<fp32_pairs>, merge_attention, finish_attention};
