// x / sqrt(mean(x^2) + epsilon) * (weight + offset)

inline vec::f32 round_to(dtype type, vec::f32 x) {
  alignas(64) std::uint16_t half[vec::lanes];
  switch (type) {
    case dtype::f32: return x;
    case dtype::bf16: return vec::round_bf16(x);
    default: vec::store_f16(half, x); return vec::load_f16(half);
  }
}

inline void store_rounded(void* base, dtype type, std::size_t i, vec::f32 x) {
  switch (type) {
    case dtype::f32: return vec::store(static_cast<float*>(base) + i, x);
    case dtype::f16: return vec::store_f16(static_cast<std::uint16_t*>(base) + i, x);
    default: return vec::store_bf16(static_cast<std::uint16_t*>(base) + i, x);
  }
}

// Elements [i, i + lanes) of a row of `size`, zero beyond its end.
inline vec::f32 load_padded(const void* base, dtype type, std::size_t i, std::size_t size) {
  if (i + vec::lanes <= size) return load_as_f32(base, type, i);
  alignas(64) char rest[vec::lanes * 4] = {};
  if (i < size) __builtin_memcpy(rest, static_cast<const char*>(base) + i * size_of(type), (size - i) * size_of(type));
  return load_as_f32(rest, type, 0);
}

inline void store_padded(void* base, dtype type, std::size_t i, std::size_t size, vec::f32 x) {
  if (i + vec::lanes <= size) return store_rounded(base, type, i, x);
  alignas(64) char rest[vec::lanes * 4];
  store_rounded(rest, type, 0, x);
  if (i < size) __builtin_memcpy(static_cast<char*>(base) + i * size_of(type), rest, (size - i) * size_of(type));
}

inline float sum_of_squares(const void* row, dtype type, std::size_t size) {
  constexpr int partial = 32, vectors = partial / vec::lanes;
  vec::f32 sums[vectors];
  for (vec::f32& sum : sums) sum = vec::zero();
  for (std::size_t i = 0; i < size; i += partial)
    KT_UNROLLED (v, vectors) {
      const vec::f32 x = load_padded(row, type, i + v * vec::lanes, size);
      sums[v] = vec::fma(x, x, sums[v]);
    }
  float all[partial];
  KT_UNROLLED (v, vectors) vec::store(all + v * vec::lanes, sums[v]);
  for (int half = partial / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) all[i] += all[i + half];
  return all[0];
}

inline void norm_row(const void* in, dtype type, std::size_t size, const norm_weight& weight, void* out) {
  const float mean = sum_of_squares(in, type, size) / static_cast<float>(size);
  const vec::f32 scale = vec::set1(1.0f / __builtin_sqrtf(mean + weight.epsilon)), offset = vec::set1(weight.offset);
  for (std::size_t i = 0; i < size; i += vec::lanes) {
    vec::f32 x = vec::mul(load_padded(in, type, i, size), scale);
    if (weight.round_first) x = round_to(type, x);
    x = vec::mul(vec::add(load_padded(weight.values, weight.type, i, size), offset), x);
    store_padded(out, type, i, size, x);
  }
}

void norm(const norm_job& job, std::size_t begin, std::size_t end) {
  const auto bytes = static_cast<std::ptrdiff_t>(size_of(job.type));
  for (std::size_t row = begin; row < end; ++row) {
    const auto g = static_cast<std::ptrdiff_t>(row / job.rows), r = static_cast<std::ptrdiff_t>(row % job.rows);
    const std::ptrdiff_t from = (g * job.group_stride + r * job.row_stride) * bytes;
    const std::ptrdiff_t to = (g * job.out_group_stride + r * job.out_row_stride) * bytes;
    const char* in = static_cast<const char*>(job.in) + from;
    if (job.addend) {
      char* sum = static_cast<char*>(job.sum) + to;
      const char* addend = static_cast<const char*>(job.addend) + from;
      for (std::size_t i = 0; i < job.size; i += vec::lanes)
        store_padded(sum, job.type, i, job.size,
                     vec::add(load_padded(in, job.type, i, job.size), load_padded(addend, job.type, i, job.size)));
      in = sum;
    }
    norm_row(in, job.type, job.size, job.weight, static_cast<char*>(job.out) + to);
  }
}
