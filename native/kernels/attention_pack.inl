// Rows of queries, keys and values to the layouts of kt/attention.h.

// Calls f with the type as a compile-time constant.
template <class F>
inline auto with_type(dtype type, F f) {
  switch (type) {
    case dtype::f32: return f(std::integral_constant<dtype, dtype::f32>{});
    case dtype::f16: return f(std::integral_constant<dtype, dtype::f16>{});
    default: return f(std::integral_constant<dtype, dtype::bf16>{});
  }
}

// The elements [i, i + lanes) of a row of `size`, zero beyond it, where nothing is read.
template <dtype type>
[[gnu::always_inline]] inline vec::f32 load_part(const void* row, std::size_t i, std::size_t size) {
  if (i + vec::lanes <= size) return load_as_f32(row, type, i);
  alignas(64) char rest[vec::lanes * 4] = {};
  if (i < size) __builtin_memcpy(rest, static_cast<const char*>(row) + i * size_of(type), (size - i) * size_of(type));
  return load_as_f32(rest, type, 0);
}

void unpack_rows(const unpack_rows_job& job) {
  with_type(job.type, [&](auto type) {
    for (int r = 0; r < job.count; ++r) {
      float* to = static_cast<float*>(job.unpacked) + r * job.stride;
      std::size_t i = 0;
      for (; i + vec::lanes <= job.stride; i += vec::lanes)
        vec::store(to + i, load_part<type()>(job.rows[r], i, job.size));
      float rest[vec::lanes];
      vec::store(rest, load_part<type()>(job.rows[r], i, job.size));
      __builtin_memcpy(to + i, rest, (job.stride - i) * sizeof(float));
    }
  });
}

// The codes [i, i + lanes) of a row of `size` as numbers, zero beyond it, where nothing is read.
[[gnu::always_inline]] inline vec::f32 load_codes(const void* row, std::size_t i, std::size_t size) {
  const char* codes = static_cast<const char*>(row) + i;
  if (i + vec::lanes <= size) return vec::load_int8(codes);
  char rest[vec::lanes] = {};
  if (i < size) __builtin_memcpy(rest, codes, size - i);
  return vec::load_int8(rest);
}

// The scale of a group of each of as many rows from `first` on as a vector has lanes, zero where there is no row.
inline vec::f32 scales_of(const pack_tile_job& job, int first, std::size_t group) {
  alignas(64) float scales[vec::lanes];
  for (int i = 0; i < vec::lanes; ++i)
    scales[i] = first + i < job.count ? static_cast<const float*>(job.scales[first + i])[group] : 0.0f;
  return vec::load(scales);
}

// Of as many rows from `first` on as a vector has lanes, the bytes from `at` on: zero beyond `size` bytes and the rows.
[[gnu::always_inline]] inline void load_bytes(const pack_tile_job& job, int first, std::size_t at, std::size_t size,
                                              vec::f32 (&x)[vec::lanes]) {
  const bool whole = first + vec::lanes <= job.count && at + sizeof x[0] <= size;
  for (int i = 0; i < vec::lanes; ++i) {
    if (whole) {
      __builtin_memcpy(x + i, static_cast<const char*>(job.rows[first + i]) + at, sizeof x[i]);
    } else {
      x[i] = vec::zero();
      if (first + i < job.count && at < size)
        __builtin_memcpy(x + i, static_cast<const char*>(job.rows[first + i]) + at,
                         size - at < sizeof x[i] ? size - at : sizeof x[i]);
    }
  }
}

// Four codes are one element of the transposition.
void pack_int8_keys(const pack_tile_job& job) {
  const std::size_t even = job.size + job.size % 2, groups = job.size / job.group;
  for (int first = 0; first < attention_tile; first += vec::lanes) {
    float* to = static_cast<float*>(job.packed) + first / panel_columns * even * panel_columns + first % panel_columns;
    vec::f32 scale = scales_of(job, first, 0);
    std::size_t group = 1, group_end = job.group;
    for (std::size_t d = 0; d < even; d += 4 * vec::lanes) {
      vec::f32 x[vec::lanes];  // of key i the codes from d on, later of each key those from d + 4 i on
      load_bytes(job, first, d, job.size, x);
      transpose(x);
      for (int i = 0; i < vec::lanes && d + 4 * i < even; ++i) {
        const std::size_t at = d + 4 * i;
        if (at == group_end && group < groups) {
          scale = scales_of(job, first, group++);
          group_end += job.group;
        }
        float* rows = to + at * panel_columns;
        vec::store(rows, vec::mul(vec::int8_of<0>(x[i]), scale));
        vec::store(rows + panel_columns, vec::mul(vec::int8_of<1>(x[i]), scale));
        if (at + 2 == even) break;
        vec::store(rows + 2 * panel_columns, vec::mul(vec::int8_of<2>(x[i]), scale));
        vec::store(rows + 3 * panel_columns, vec::mul(vec::int8_of<3>(x[i]), scale));
      }
    }
  }
}

// As many keys at a time as a vector has lanes, by transposition.
void pack_keys(const pack_tile_job& job) {
  if (job.scales) return pack_int8_keys(job);
  const std::size_t even = job.size + job.size % 2;
  with_type(job.type, [&](auto type) {
    for (int first = 0; first < attention_tile; first += vec::lanes) {
      float* to =
          static_cast<float*>(job.packed) + first / panel_columns * even * panel_columns + first % panel_columns;
      const bool all_keys = first + vec::lanes <= job.count;
      for (std::size_t d = 0; d < even; d += vec::lanes) {
        vec::f32 x[vec::lanes];
        if (all_keys && d + vec::lanes <= job.size) {
          KT_UNROLLED (i, vec::lanes) x[i] = load_as_f32(job.rows[first + i], type(), d);
          transpose(x);
          KT_UNROLLED (i, vec::lanes) vec::store(to + (d + i) * panel_columns, x[i]);
          continue;
        }
        for (int i = 0; i < vec::lanes; ++i)
          x[i] = first + i < job.count ? load_part<type()>(job.rows[first + i], d, job.size) : vec::zero();
        transpose(x);
        for (int i = 0; i < vec::lanes; ++i)
          if (d + i < even) vec::store(to + (d + i) * panel_columns, x[i]);
      }
    }
  });
}

// Codes are finite, and so are products with scales that are far from the largest number.
bool pack_int8_values(const pack_tile_job& job) {
  const std::size_t panel = static_cast<std::size_t>(attention_tile) * panel_columns;
  bool finite = true;
  for (int j = 0; j < attention_tile; ++j) {
    float* to = static_cast<float*>(job.packed) + j * panel_columns;
    const float* scales = j < job.count ? static_cast<const float*>(job.scales[j]) : nullptr;
    vec::f32 scale = vec::zero();
    for (std::size_t c = 0, group_end = 0; c < job.size; c += panel_columns, to += panel)
      KT_UNROLLED (v, column_vectors) {
        const std::size_t at = c + v * vec::lanes;
        if (scales && at == group_end && at < job.size) {
          finite &= __builtin_fabsf(*scales) < 0x1p100f;
          scale = vec::set1(*scales++);
          group_end += job.group;
        }
        const vec::f32 x = scales ? load_codes(job.rows[j], at, job.size) : vec::zero();
        vec::store(to + v * vec::lanes, vec::mul(x, scale));
      }
  }
  return finite;
}

bool pack_values(const pack_tile_job& job) {
  if (job.scales) return pack_int8_values(job);
  const std::size_t panel = static_cast<std::size_t>(attention_tile) * panel_columns;
  vec::f32 sums[column_vectors];  // of zeros, NaN from the first element on that is not finite
  KT_UNROLLED (v, column_vectors) sums[v] = vec::zero();
  with_type(job.type, [&](auto type) {
    for (int j = 0; j < attention_tile; ++j) {
      float* to = static_cast<float*>(job.packed) + j * panel_columns;
      for (std::size_t c = 0; c < job.size; c += panel_columns, to += panel)
        KT_UNROLLED (v, column_vectors) {
          const std::size_t at = c + v * vec::lanes;
          const vec::f32 x = j < job.count ? load_part<type()>(job.rows[j], at, job.size) : vec::zero();
          sums[v] = vec::fma(x, vec::zero(), sums[v]);
          vec::store(to + v * vec::lanes, x);
        }
    }
  });
  bool finite = true;
  for (const vec::f32& sum : sums) {
    float lanes[vec::lanes];
    vec::store(lanes, sum);
    for (float x : lanes) finite &= x == x;
  }
  return finite;
}
