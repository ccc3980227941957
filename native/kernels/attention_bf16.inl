// Rows of queries, keys and values in bf16 as they are, to the layouts of kt/attention.h.

constexpr std::size_t bf16_unit = 32;  // what keys' size is made a multiple of: AMX multiplies so many at once
constexpr std::size_t bf16_pair_bytes = 2 * panel_columns * 2;
constexpr std::size_t bf16_values_panel = attention_tile / 2 * bf16_pair_bytes;

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
