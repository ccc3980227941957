// Attention of queries, keys and values in bf16 on tiles: kt/attention.h has the formulas and the layouts. Included
// after attention.inl and gemm_amx.inl.

constexpr int two_tiles = 32;  // rows

// c = c + a * b, or a * b, of 32 columns.
struct tile_product {
  const char* a;  // row m at m * a_stride bytes
  std::size_t a_stride;
  const char* b;  // part of a panel
  std::size_t steps;
  float* c;  // row m at m * c_stride elements
  std::size_t c_stride;
  bool first;  // c is overwritten
};

// 1 to 32 rows.
inline void multiply_on_tiles(tile_session& session, int rows, const tile_product& job) {
  const std::size_t c_stride = job.c_stride * sizeof(float);
  char* const c = reinterpret_cast<char*>(job.c);
  const tile_of_rows low{job.a, job.a_stride, 64, c, c_stride};
  line_fetch nothing;
  if (rows > 16) {
    const tile_of_rows high{job.a + 16 * job.a_stride, job.a_stride, low.step, c + 16 * c_stride, c_stride};
    session.configure(16, rows - 16);
    multiply_tiles<tile_dot_bf16, 2>(job.b, job.steps, low, high, job.first, nothing);
  } else {
    session.configure(rows, 0);
    multiply_tiles<tile_dot_bf16, 1>(job.b, job.steps, low, {}, job.first, nothing);
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
    constexpr int step = bf16_unit;
    const seen s(job, 0, job.rows);
    begin = s.begin / step;
    end = s.begin < s.end ? (s.end + step - 1) / step : begin;
  }
};

void scores_on_tiles(tile_session& session, const attend_job& job, const seen_steps& s, tile_fetch& fetch) {
  const std::size_t panel_bytes = job.size / 2 * bf16_pair_bytes;
  for (int panel = 0; panel < attention_tile / panel_columns; ++panel) {
    fetch.step();
    if (panel < s.begin || panel >= s.end) continue;
    multiply_on_tiles(
        session, job.rows,
        {static_cast<const char*>(job.queries), job.size * 2, static_cast<const char*>(job.keys) + panel * panel_bytes,
         job.size / bf16_unit, job.scores + panel * panel_columns, attention_tile, true});
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
  const char* a = reinterpret_cast<const char*>(weights + s.begin * bf16_unit);
  const char* values = static_cast<const char*>(job.values) + s.begin * (bf16_unit / 2 * bf16_pair_bytes);
  for (std::size_t column = 0; column < job.columns; column += panel_columns, values += bf16_values_panel) {
    fetch.step();
    if (s.begin >= s.end) continue;
    multiply_on_tiles(session, job.rows,
                      {a, attention_tile * 2, values, static_cast<std::size_t>(s.end - s.begin), job.state.out + column,
                       job.state.width, false});
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
      for (int first = 0; first < attention_tile; first += bf16_unit) {
        vec::f32 even = vec::zero(), odd = vec::zero();
        for (int j = first; j < first + static_cast<int>(bf16_unit); j += 2) {
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

// Rounded to the nearest numbers of eight bits by Veltkamp's splitting: three operations, NaN stays.
struct tile_weights {
  static constexpr std::size_t stride = attention_tile * 2;
  static vec::f32 fraction(vec::f32 r) { return exp2_fraction_for_bf16(r); }
  [[gnu::always_inline]] static void keep(vec::f32 (&p)[row_vectors], char* row, float* sums, float factor) {
    KT_UNROLLED (j, row_vectors) {
      const vec::f32 large = vec::mul(p[j], vec::set1(0x10001p0f));
      p[j] = vec::sub(large, vec::sub(large, p[j]));
      vec::store_high(row + j * vec::lanes * 2, p[j]);
    }
    add_weights(p, sums, factor);
  }
};

// 1 to 32 rows.
void attend_two_tiles(tile_session& session, const attend_job& job, tile_fetch& fetch) {
  float factor[two_tiles];
  alignas(64) std::uint16_t weights[two_tiles * attention_tile];  // [rows][64]
  const seen_steps s(job);
  scores_on_tiles(session, job, s, fetch);
  weigh<tile_weights>(job, weights, factor);
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
    2, bf16_unit, copy_bf16_rows, pack_bf16_keys, pack_bf16_values, attend_bf16, merge_attention, finish_attention};
