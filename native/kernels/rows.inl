// Packing of activations, the activation between the two GEMMs, and the weighted sum after them.

// Writes element (row, k) of a packed block; `rows` and `row` are those of its tile.
struct fp32_block {
  static constexpr std::size_t bytes = 4;
  static void put(void* tile, int rows, int row, std::size_t k, float x) {
    static_cast<float*>(tile)[k * rows + row] = x;
  }
};

struct bf16_block {
  static constexpr std::size_t bytes = 2;
  static void put(void* tile, int rows, int row, std::size_t k, float x) {
    static_cast<std::uint16_t*>(tile)[(k / 2 * rows + row) * 2 + k % 2] =
        static_cast<std::uint16_t>(as_u32(x) >> 16);  // x is representable
  }
};

inline vec::f32 load_as_f32(const void* base, dtype type, std::size_t i) {
  switch (type) {
    case dtype::f32: return vec::load(static_cast<const float*>(base) + i);
    case dtype::f16: return vec::load_f16(static_cast<const std::uint16_t*>(base) + i);
    default: return vec::load_bf16(static_cast<const std::uint16_t*>(base) + i);
  }
}

template <class Block>
void pack_rows(const pack_rows_job& job) {
  const tiling tiles(job.rows);
  const std::size_t size = size_of(job.type);
  for (int t = 0; t < tiles.count; ++t) {
    const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
    char* tile = static_cast<char*>(job.packed) + begin * job.k_padded * Block::bytes;
    // A few k of all rows at a time, so that the tile is written once from its beginning to its end.
    for (std::size_t k = 0; k < job.k_padded; k += vec::lanes)
      for (int r = 0; r < rows; ++r) {
        const char* row = static_cast<const char*>(job.source) + job.index[begin + r] * job.stride * size;
        float x[vec::lanes];
        if (k + vec::lanes <= job.k) {
          vec::store(x, load_as_f32(row, job.type, k));
          KT_UNROLLED (i, vec::lanes) Block::put(tile, rows, r, k + i, x[i]);
        } else {
          alignas(64) char rest[vec::lanes * 4] = {};
          if (k < job.k) __builtin_memcpy(rest, row + k * size, (job.k - k) * size);
          vec::store(x, load_as_f32(rest, job.type, 0));
          for (std::size_t i = 0; i < vec::lanes && k + i < job.k_padded; ++i) Block::put(tile, rows, r, k + i, x[i]);
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
  const tiling tiles(job.rows);
  const int columns = job.spec.gated ? panel_columns / 2 : panel_columns;
  const auto at = [&](const float* row, int column) {
    const vec::f32 x = vec::load(row + column);
    return job.bias ? vec::add(x, vec::load(job.bias + column)) : x;
  };
  for (int t = 0; t < tiles.count; ++t) {
    const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
    char* tile = static_cast<char*>(job.packed) + begin * job.k * Block::bytes;
    for (int r = 0; r < rows; ++r) {
      const float* row = job.c + (begin + r) * panel_columns;
      for (int column = 0; column < columns; column += vec::lanes) {
        vec::f32 h = job.spec.gated ? apply_gated(job.spec, at(row, column), at(row, column + columns))
                                    : apply(job.spec, at(row, column));
        if (job.round_to_bf16) h = vec::round_bf16(h);
        float x[vec::lanes];
        vec::store(x, h);
        KT_UNROLLED (i, vec::lanes) Block::put(tile, rows, r, job.column + column + i, x[i]);
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
      const vec::f32 x = vec::load(job.sum + r * panel_columns + column);
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
