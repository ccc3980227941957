// Attention of queries, keys and values in bf16 on tiles: kt/attention.h has the formulas and the layouts. Included
// after attention.inl and gemm_amx.inl.

constexpr std::size_t tile_k = 32;                              // dimensions or positions of a tile of either factor
constexpr std::size_t tile_k_bytes = tile_k / 2 * 128;          // of a panel of 32 columns
constexpr std::size_t bf16_values_panel = attention_tile * 64;  // bytes
constexpr int two_tiles = 32;                                   // rows

void copy_bf16_rows(const unpack_rows_job& job) {
  for (int r = 0; r < job.count; ++r) {
    char* to = static_cast<char*>(job.unpacked) + r * job.stride * 2;
    __builtin_memcpy(to, job.rows[r], job.size * 2);
    __builtin_memset(to + job.size * 2, 0, (job.stride - job.size) * 2);
  }
}

// A pair of dimensions is one element of the transposition.
void pack_bf16_keys(const pack_tile_job& job) {
  const std::size_t pairs = (job.size + tile_k - 1) / tile_k * tile_k / 2;
  for (int first = 0; first < attention_tile; first += vec::lanes) {
    float* to = static_cast<float*>(job.packed) + first / panel_columns * pairs * panel_columns + first % panel_columns;
    std::size_t pair = 0;
    for (; first + vec::lanes <= job.count && pair + vec::lanes <= job.size / 2; pair += vec::lanes) {
      vec::f32 x[vec::lanes];
      KT_UNROLLED (i, vec::lanes)
        __builtin_memcpy(x + i, static_cast<const char*>(job.rows[first + i]) + pair * 4, sizeof x[i]);
      transpose(x);
      KT_UNROLLED (i, vec::lanes) vec::store(to + (pair + i) * panel_columns, x[i]);
    }
    for (; pair < pairs; pair += vec::lanes) {
      vec::f32 x[vec::lanes];
      load_bytes(job, first, pair * 4, job.size * 2, x);
      transpose(x);
      KT_UNROLLED (i, vec::lanes) vec::store(to + (pair + i) * panel_columns, x[i]);
    }
  }
}

// Numbers of bf16 in a vector, and pairs of the same columns of two of them.
class bf16_words {
 public:
  static constexpr int count = 2 * vec::lanes;
  typedef std::uint16_t words __attribute__((vector_size(2 * count)));
  static constexpr words pairs(int from) {
    std::uint16_t lanes[count] = {};
    for (int i = 0; i < count; ++i) lanes[i] = static_cast<std::uint16_t>(from + i / 2 + i % 2 * count);
    return __builtin_bit_cast(words, lanes);
  }
};

bool pack_bf16_values(const pack_tile_job& job) {
  using words = bf16_words::words;
  const std::size_t bytes = job.size * 2;
  const auto load = [&](int j, std::size_t at) __attribute__((always_inline)) {
    words x = {};
    if (j >= job.count || at >= bytes) return x;
    const char* row = static_cast<const char*>(job.rows[j]) + at;
    if (at + sizeof x <= bytes) {
      __builtin_memcpy(&x, row, sizeof x);
      return x;
    }
    alignas(64) char rest[sizeof x] = {};
    __builtin_memcpy(rest, row, bytes - at);
    __builtin_memcpy(&x, rest, sizeof x);
    return x;
  };
  words sign = {};  // set from the first number on that is infinite or NaN
  char* to = static_cast<char*>(job.packed);
  for (std::size_t panel = 0; panel < bytes; panel += panel_columns * 2)
    for (int j = 0; j < attention_tile; j += 2)
      KT_UNROLLED (i, panel_columns / bf16_words::count) {
        const words even = load(j, panel + i * sizeof(words)), odd = load(j + 1, panel + i * sizeof(words));
        sign |= ((even & 0x7fff) + 0x80) | ((odd & 0x7fff) + 0x80);
        const words low = __builtin_shuffle(even, odd, bf16_words::pairs(0));
        const words high = __builtin_shuffle(even, odd, bf16_words::pairs(vec::lanes));
        __builtin_memcpy(to, &low, sizeof low);
        __builtin_memcpy(to + sizeof low, &high, sizeof high);
        to += 2 * sizeof low;
      }
  unsigned all = 0;
  for (int i = 0; i < bf16_words::count; ++i) all |= sign[i];
  return all < 0x8000;
}

// c = c + a * b, or a * b, of 32 columns.
struct tile_product {
  const char* a;  // row m at m * a_stride bytes
  std::size_t a_stride;
  const char* b;  // part of a panel
  int steps;      // of 32 k
  float* c;       // row m at m * c_stride elements
  std::size_t c_stride;
  bool first;  // c is overwritten
};

// N tiles of rows, one or two.
template <int N>
void multiply_on_tiles(const tile_product& job) {
  const std::size_t stride = job.c_stride * sizeof(float);
  char* c[2] = {reinterpret_cast<char*>(job.c), reinterpret_cast<char*>(job.c) + 16 * stride};
  if (job.first) {
    tiles::zero<0>();
    tiles::zero<1>();
    if constexpr (N == 2) {
      tiles::zero<2>();
      tiles::zero<3>();
    }
  } else {
    tiles::load<0>(c[0], stride);
    tiles::load<1>(c[0] + 64, stride);
    if constexpr (N == 2) {
      tiles::load<2>(c[1], stride);
      tiles::load<3>(c[1] + 64, stride);
    }
  }
  const char *a = job.a, *b = job.b;
  for (int step = 0; step < job.steps; ++step, a += 64, b += tile_k_bytes) {
    tiles::load<6>(b, 128);
    tiles::load<4>(a, job.a_stride);
    tiles::dpbf16<0, 4, 6>();
    tiles::load<7>(b + 64, 128);
    tiles::dpbf16<1, 4, 7>();
    if constexpr (N == 2) {
      tiles::load<5>(a + 16 * job.a_stride, job.a_stride);
      tiles::dpbf16<2, 5, 6>();
      tiles::dpbf16<3, 5, 7>();
    }
  }
  tiles::store<0>(c[0], stride);
  tiles::store<1>(c[0] + 64, stride);
  if constexpr (N == 2) {
    tiles::store<2>(c[1], stride);
    tiles::store<3>(c[1] + 64, stride);
  }
}

// 1 to 32 rows.
inline void multiply_on_tiles(tile_session& session, int rows, const tile_product& job) {
  if (rows > 16) {
    session.configure(16, rows - 16);
    multiply_on_tiles<2>(job);
  } else {
    session.configure(rows, 0);
    multiply_on_tiles<1>(job);
  }
}

// 1 to 32 rows of a job, whose scores take the room of the first ones.
inline attend_job rows_of(const attend_job& job, int first, int rows) {
  attend_job part = job;
  part.queries = static_cast<const char*>(job.queries) + first * job.size * 2;
  part.rows = rows;
  part.begin += first;
  part.end += first;
  part.mask_rows += first;
  part.state = {job.state.max + first, job.state.sums + first * attention_sums, job.state.out + first * job.state.width,
                job.state.width};
  return part;
}

// The steps of 32 positions that some of its rows see: [begin, end).
struct seen_steps {
  int begin, end;
  explicit seen_steps(const attend_job& job) {
    constexpr int step = tile_k;
    const seen s(job, 0, job.rows);
    begin = s.begin / step;
    end = s.begin < s.end ? (s.end + step - 1) / step : begin;
  }
};

void scores_on_tiles(tile_session& session, const attend_job& job, const seen_steps& s, tile_fetch& fetch) {
  const std::size_t panel_bytes = job.size / tile_k * tile_k_bytes;
  for (int panel = 0; panel < attention_tile / panel_columns; ++panel) {
    fetch.step();
    if (panel < s.begin || panel >= s.end) continue;
    multiply_on_tiles(
        session, job.rows,
        {static_cast<const char*>(job.queries), job.size * 2, static_cast<const char*>(job.keys) + panel * panel_bytes,
         static_cast<int>(job.size / tile_k), job.scores + panel * panel_columns, attention_tile, true});
  }
}

void shrink_sums(const attend_job& job, const float* factor) {
  for (int r = 0; r < job.rows; ++r) {
    if (factor[r] == 1) continue;
    float* out = job.state.out + r * job.state.width;
    const vec::f32 f = vec::set1(factor[r]);
    for (std::size_t c = 0; c < job.state.width; c += vec::lanes) vec::store(out + c, vec::mul(vec::load(out + c), f));
  }
}

void values_on_tiles(tile_session& session, const attend_job& job, const std::uint16_t* weights, const seen_steps& s,
                     tile_fetch& fetch) {
  const char* a = reinterpret_cast<const char*>(weights + s.begin * tile_k);
  const char* values = static_cast<const char*>(job.values) + s.begin * tile_k_bytes;
  for (std::size_t column = 0; column < job.columns; column += panel_columns, values += bf16_values_panel) {
    fetch.step();
    if (s.begin >= s.end) continue;
    multiply_on_tiles(session, job.rows,
                      {a, attention_tile * 2, values, s.end - s.begin, job.state.out + column, job.state.width, false});
  }
}

// The same sums without products by zero, which is NaN if the value is infinite or NaN.
void bf16_values_one_by_one(const attend_job& job, const std::uint16_t* weights) {
  for (int r = 0; r < job.rows; ++r) {
    const std::uint16_t* p = weights + r * attention_tile;
    const auto weight = [&](int j) { return as_f32(static_cast<std::uint32_t>(p[j]) << 16); };
    for (std::size_t c = 0; c < job.columns; c += vec::lanes) {
      float* out = job.state.out + r * job.state.width + c;
      const char* v = static_cast<const char*>(job.values) + c / panel_columns * bf16_values_panel;
      vec::f32 sum = vec::load(out);
      for (int first = 0; first < attention_tile; first += tile_k) {
        vec::f32 even = vec::zero(), odd = vec::zero();
        for (int j = first; j < first + static_cast<int>(tile_k); j += 2) {
          const char* pair = v + j / 2 * 128 + c % panel_columns * 4;
          if (p[j]) even = vec::fma(vec::set1(weight(j)), vec::bf16_even(pair), even);
          if (p[j + 1]) odd = vec::fma(vec::set1(weight(j + 1)), vec::bf16_odd(pair), odd);
        }
        sum = vec::add(sum, vec::add(even, odd));
      }
      vec::store(out, sum);
    }
  }
}

// To the nearest number of eight bits, by Veltkamp's splitting: three operations, NaN stays. For numbers up to 1.
inline vec::f32 round_weight(vec::f32 p) {
  const vec::f32 large = vec::mul(p, vec::set1(0x10001p0f));
  return vec::sub(large, vec::sub(large, p));
}

// 1 to 32 rows.
void attend_two_tiles(tile_session& session, const attend_job& job, tile_fetch& fetch) {
  float factor[two_tiles];
  alignas(64) std::uint16_t weights[two_tiles * attention_tile];  // [rows][64]
  const seen_steps s(job);
  scores_on_tiles(session, job, s, fetch);
  weigh(job, factor, [&](int r, int j, vec::f32 p) {
    const vec::f32 rounded = round_weight(p);
    vec::store_high(weights + r * attention_tile + j, rounded);
    return rounded;
  });
  shrink_sums(job, factor);
  if (job.finite)
    values_on_tiles(session, job, weights, s, fetch);
  else
    bf16_values_one_by_one(job, weights);
}

// Two tiles of rows at a time from scores to sums: what they need fits in the first-level cache, or nearly.
void attend_bf16(const attend_job& job) {
  const int panels = static_cast<int>((attention_tile + job.columns + panel_columns - 1) / panel_columns);
  tile_fetch fetch(job, panels * ((job.rows + two_tiles - 1) / two_tiles));
  tile_session session;
  for (int r = 0; r < job.rows; r += two_tiles)
    attend_two_tiles(session, rows_of(job, r, job.rows - r < two_tiles ? job.rows - r : two_tiles), fetch);
}

constexpr attention_kernels attention_bf16 = {
    2, tile_k, copy_bf16_rows, pack_bf16_keys, pack_bf16_values, attend_bf16, merge_attention, finish_attention};
