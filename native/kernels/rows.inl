// Packing of activations, the activation between the two GEMMs, and the weighted sum after them.

// Where element (row, k) of a packed block lies: `Unit` k of a row together, of type T. `rows` and `row` are those of
// its tile.
template <class T, int Unit, int MaxRows>
struct block {
  using element = T;
  using cut = tiling<MaxRows>;
  static T& at(void* tile, int rows, int row, std::size_t k) {
    return static_cast<T*>(tile)[(k / Unit * rows + row) * Unit + k % Unit];
  }
  // As many k of a row as a vector has, from k on, which is a multiple of that. bf16 is rounded to.
  static void put(void* tile, int rows, int row, std::size_t k, vec::f32 x) {
    alignas(64) T values[vec::lanes];
    if constexpr (sizeof(T) == 4)
      vec::store(values, x);
    else
      vec::store_bf16(values, x);
    copy(tile, rows, row, k, values);
  }
  static void copy(void* tile, int rows, int row, std::size_t k, const void* values) {
    constexpr int together = Unit < vec::lanes ? Unit : vec::lanes;
    KT_UNROLLED (i, vec::lanes / together)
      __builtin_memcpy(&at(tile, rows, row, k + i * together), static_cast<const T*>(values) + i * together,
                       together * sizeof(T));
  }
  // The same for four rows from `row` on.
  static constexpr bool copies_four = Unit * sizeof(T) == 4 && vec::lanes * sizeof(T) % 16 == 0;
  static void copy_four(void* tile, int rows, int row, std::size_t k, const char* const (&values)[4]) {
    constexpr int together = 16 / sizeof(T);
    KT_UNROLLED (i, vec::lanes / together) {
      words r[4];
      KT_UNROLLED (j, 4) __builtin_memcpy(&r[j], values[j] + 16 * i, 16);
      const words low01 = __builtin_shuffle(r[0], r[1], words{0, 4, 1, 5});
      const words low23 = __builtin_shuffle(r[2], r[3], words{0, 4, 1, 5});
      const words high01 = __builtin_shuffle(r[0], r[1], words{2, 6, 3, 7});
      const words high23 = __builtin_shuffle(r[2], r[3], words{2, 6, 3, 7});
      r[0] = __builtin_shuffle(low01, low23, words{0, 1, 4, 5});
      r[1] = __builtin_shuffle(low01, low23, words{2, 3, 6, 7});
      r[2] = __builtin_shuffle(high01, high23, words{0, 1, 4, 5});
      r[3] = __builtin_shuffle(high01, high23, words{2, 3, 6, 7});
      KT_UNROLLED (j, 4) __builtin_memcpy(&at(tile, rows, row, k + i * together + j * Unit), &r[j], 16);
    }
  }

 private:
  typedef std::uint32_t words __attribute__((vector_size(16)));
};

using fp32_block = block<float, 1, vec::max_rows>;
using bf16_block = block<std::uint16_t, 2, vec::max_rows>;
using int8_block = block<std::uint8_t, 4, vec::max_rows>;

inline vec::f32 load_as_f32(const void* base, dtype type, std::size_t i) {
  switch (type) {
    case dtype::f32: return vec::load(static_cast<const float*>(base) + i);
    case dtype::f16: return vec::load_f16(static_cast<const std::uint16_t*>(base) + i);
    default: return vec::load_bf16(static_cast<const std::uint16_t*>(base) + i);
  }
}

template <class Block>
void pack_rows(const pack_rows_job& job) {
  const typename Block::cut tiles(job.rows);
  const std::size_t size = size_of(job.type);
  const bool as_it_is = sizeof(typename Block::element) == 2 && job.type == dtype::bf16;
  for (int t = 0; t < tiles.count; ++t) {
    const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
    char* tile = static_cast<char*>(job.packed) + begin * job.k_padded * sizeof(typename Block::element);
    const auto row = [&](int r) {
      const std::size_t from = job.index ? job.index[begin + r] : begin + r;
      return static_cast<const char*>(job.source) + from * job.stride * size;
    };
    // A few k of all rows at a time, so that the tile is written once from its beginning to its end.
    for (std::size_t k = 0; k < job.k_padded; k += vec::lanes) {
      int r = 0;
      if constexpr (Block::copies_four)
        if (as_it_is && k + vec::lanes <= job.k)
          for (; r + 4 <= rows; r += 4) {
            const std::size_t at = k * size;
            Block::copy_four(tile, rows, r, k, {row(r) + at, row(r + 1) + at, row(r + 2) + at, row(r + 3) + at});
          }
      for (; r < rows; ++r) {
        const char* values = row(r) + k * size;
        alignas(64) char rest[vec::lanes * 4] = {};
        if (k + vec::lanes > job.k) {
          if (k < job.k) __builtin_memcpy(rest, values, (job.k - k) * size);
          values = rest;
        }
        if (as_it_is)
          Block::copy(tile, rows, r, k, values);
        else
          Block::put(tile, rows, r, k, load_as_f32(values, job.type, 0));
      }
    }
  }
}

// How four codes of a row are stored.
constexpr std::uint32_t plain_codes(std::uint32_t four) { return four; }
constexpr std::uint32_t unsigned_codes(std::uint32_t four) { return four ^ 0x80808080u; }  // code + 128
constexpr std::uint32_t int4_codes(std::uint32_t four) {  // the second and the third exchanged, as int4 has its own
  return (four & 0xff0000ffu) | (four & 0xff00u) << 8 | (four >> 8 & 0xff00u);
}

template <class Block, std::uint32_t (*Stored)(std::uint32_t)>
void pack_int8_rows(const pack_rows_job& job) {
  const typename Block::cut tiles(job.rows);
  for (int t = 0; t < tiles.count; ++t) {
    const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
    char* tile = static_cast<char*>(job.packed) + begin * job.k_padded;
    for (int r = 0; r < rows; ++r) {
      const std::size_t from = job.index ? job.index[begin + r] : begin + r;
      const char* row = static_cast<const char*>(job.source) + from * job.stride;
      for (std::size_t k = 0; k < job.k_padded; k += 4) {
        const std::uint32_t four = Stored(load_as<std::uint32_t>(row + k));
        __builtin_memcpy(&Block::at(tile, rows, r, k), &four, 4);
      }
    }
  }
}

// The codes of [begin, end) of a row, which share the scale that is returned. at(k): `vec::lanes` numbers; from
// k = `count` on there are none.
template <class At>
float quantize_span(std::size_t begin, std::size_t end, std::size_t count, At at, std::int8_t* codes) {
  const std::size_t numbers = count < end ? count : end;
  vec::f32 most = vec::zero(), finite = vec::zero();
  for (std::size_t i = begin; i < numbers; i += vec::lanes) {
    most = vec::max(vec::abs(at(i)), most);
    finite = vec::fma(at(i), vec::zero(), finite);  // NaN from here on, if an element is none or infinite
  }
  float lanes[vec::lanes], nan[vec::lanes], scale = 0;
  vec::store(lanes, most);
  vec::store(nan, finite);
  for (float x : lanes) scale = x > scale ? x : scale;
  // Smaller rows are zero: the inverse of their scale might be no number.
  const float inverse = scale >= 0x1p-100f ? 127.0f / scale : 0.0f;
  scale = inverse > 0.0f ? scale / 127.0f : 0.0f;
  for (float x : nan) scale = x == x ? scale : x;  // and so all of them
  for (std::size_t i = begin; i < end; i += vec::lanes) {
    std::int8_t some[vec::lanes] = {};
    if (scale > 0.0f && i < numbers) vec::store_int8(some, vec::round(vec::mul(at(i), vec::set1(inverse))));
    __builtin_memcpy(codes + i, some, i + vec::lanes <= end ? sizeof some : end - i);
  }
  return scale;
}

void quantize_rows(const quantize_rows_job& job) {
  const std::size_t size = size_of(job.type), whole = job.k / vec::lanes * vec::lanes;
  float* scale = job.scale;
  for (std::size_t r = 0; r < job.rows; ++r) {
    const char* row = static_cast<const char*>(job.source) + r * job.stride * size;
    std::int8_t* codes = job.codes + r * job.k_padded;
    alignas(64) char rest[vec::lanes * 4] = {};
    if (whole < job.k) __builtin_memcpy(rest, row + whole * size, (job.k - whole) * size);
    const auto at = [&](std::size_t k) {
      return k < whole ? load_as_f32(row, job.type, k) : load_as_f32(rest, job.type, 0);
    };
    if (!job.group) *scale++ = quantize_span(0, job.k_padded, job.k, at, codes);
    for (std::size_t k = 0, end; job.group && k < job.k_padded; k = end) {
      end = k + job.group < job.k_padded ? k + job.group : job.k_padded;
      *scale++ = quantize_span(k, end, job.k, at, codes);
      for (std::size_t i = k; i < end; i += 32, ++scale) {
        int even = 0, odd = 0;
        for (int j = 0; j < 32; j += 2) {
          even += codes[i + j];
          odd += codes[i + j + 1];
        }
        const std::uint32_t sum = dot::int4_sum(even, odd);
        __builtin_memcpy(scale, &sum, 4);
      }
    }
  }
}

inline vec::f32 apply(const activation_spec& spec, vec::f32 x) {
  switch (spec.kind) {
    case activation::silu: return times_sigmoid(x, x);
    case activation::gelu_tanh: return gelu_tanh(x);
    case activation::gelu_erf: return gelu_erf(x);
    case activation::relu: return vec::max(vec::zero(), x);  // NaN passes
    default: {
      const vec::f32 r = vec::max(vec::zero(), x);
      return vec::mul(r, r);
    }
  }
}

inline vec::f32 apply_gated(const activation_spec& spec, vec::f32 gate, vec::f32 up) {
  if (spec.limit > 0.0f) {
    const vec::f32 limit = constant(spec.limit);
    gate = vec::min(limit, gate);
    up = vec::max(constant(-spec.limit), vec::min(limit, up));
  }
  if (spec.kind == activation::swigluoai)
    return vec::mul(times_sigmoid(gate, vec::mul(gate, constant(spec.alpha))), vec::add(up, constant(1.0f)));
  return vec::mul(apply(spec, gate), up);
}

template <class Block>
void activate(const activate_job& job) {
  const typename Block::cut tiles(job.rows);
  const int columns = job.spec.gated ? panel_columns / 2 : panel_columns;
  const auto at = [&](const float* row, int column) {
    const vec::f32 x = vec::load(row + column);
    return job.bias ? vec::add(x, vec::load(job.bias + column)) : x;
  };
  for (int t = 0; t < tiles.count; ++t) {
    const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
    char* tile = static_cast<char*>(job.packed) + begin * job.k * sizeof(typename Block::element);
    for (int r = 0; r < rows; ++r) {
      const float* row = job.c + (begin + r) * panel_columns;
      for (int column = 0; column < columns; column += vec::lanes) {
        vec::f32 h = job.spec.gated ? apply_gated(job.spec, at(row, column), at(row, column + columns))
                                    : apply(job.spec, at(row, column));
        if (job.round_to_bf16 && sizeof(typename Block::element) == 4) h = vec::round_bf16(h);
        Block::put(tile, rows, r, job.column + column, h);
      }
    }
  }
}

void accumulate(const accumulate_job& job) {
  for (int r = 0; r < job.rows; ++r) {
    const vec::f32 weight = vec::set1(job.weight[r]);
    const float* row = job.c + r * panel_columns;
    float* sum = job.sum + static_cast<std::size_t>(job.index[r]) * panel_columns;
    for (int column = 0; column < panel_columns; column += vec::lanes) {
      vec::f32 x = vec::load(row + column);
      if (job.bias) x = vec::add(x, vec::load(job.bias + column));
      vec::store(sum + column, vec::fma(weight, x, vec::load(sum + column)));
    }
  }
}

template <dtype T>
void store_rows(const store_job& job) {
  constexpr std::size_t size = size_of(T);
  alignas(64) char line[panel_columns * size];
  for (std::size_t r = 0; r < job.rows; ++r) {
    char* out = static_cast<char*>(job.out) + r * job.stride * size;
    char* to = job.columns == panel_columns ? out : line;
    for (int column = 0; column < panel_columns; column += vec::lanes) {
      vec::f32 x = vec::load(job.sum + r * panel_columns + column);
      if (job.bias) x = vec::add(x, vec::load(job.bias + column));
      if constexpr (T == dtype::f32)
        vec::store(reinterpret_cast<float*>(to) + column, x);
      else if constexpr (T == dtype::f16)
        vec::store_f16(to + column * size, x);
      else
        vec::store_bf16(to + column * size, x);
    }
    if (to == line) __builtin_memcpy(out, line, job.columns * size);
  }
}

void store(const store_job& job) {
  switch (job.type) {
    case dtype::f32: return store_rows<dtype::f32>(job);
    case dtype::f16: return store_rows<dtype::f16>(job);
    case dtype::bf16: return store_rows<dtype::bf16>(job);
  }
}
