// Rows of queries and keys in bf16 as they are, to the layouts of kt/attention.h.

constexpr std::size_t bf16_unit = 32;  // what keys' size is made a multiple of: AMX multiplies so many at once
constexpr std::size_t bf16_pair_bytes = 2 * panel_columns * 2;

void copy_bf16_rows(const unpack_rows_job& job) {
  for (int r = 0; r < job.count; ++r) {
    char* to = static_cast<char*>(job.unpacked) + r * job.stride * 2;
    __builtin_memcpy(to, job.rows[r], job.size * 2);
    __builtin_memset(to + job.size * 2, 0, (job.stride - job.size) * 2);
  }
}

// A pair of dimensions is one element of the transposition.
void pack_bf16_keys(const pack_tile_job& job) {
  const std::size_t pairs = (job.size + bf16_unit - 1) / bf16_unit * bf16_unit / 2;
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
