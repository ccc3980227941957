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
      float* to = job.unpacked + r * job.stride;
      std::size_t i = 0;
      for (; i + vec::lanes <= job.stride; i += vec::lanes)
        vec::store(to + i, load_part<type()>(job.rows[r], i, job.size));
      float rest[vec::lanes];
      vec::store(rest, load_part<type()>(job.rows[r], i, job.size));
      __builtin_memcpy(to + i, rest, (job.stride - i) * sizeof(float));
    }
  });
}

// As many keys at a time as a vector has lanes, by transposition.
void pack_keys(const pack_tile_job& job) {
  const std::size_t even = job.size + job.size % 2;
  with_type(job.type, [&](auto type) {
    for (int first = 0; first < attention_tile; first += vec::lanes) {
      float* to = job.packed + first / panel_columns * even * panel_columns + first % panel_columns;
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

bool pack_values(const pack_tile_job& job) {
  const std::size_t panel = static_cast<std::size_t>(attention_tile) * panel_columns;
  vec::f32 sums[column_vectors];  // of zeros, NaN from the first element on that is not finite
  KT_UNROLLED (v, column_vectors) sums[v] = vec::zero();
  with_type(job.type, [&](auto type) {
    for (int j = 0; j < attention_tile; ++j) {
      float* to = job.packed + j * panel_columns;
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
