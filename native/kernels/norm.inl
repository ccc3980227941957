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

void norm(const norm_job& job, std::size_t begin, std::size_t end) {
  const std::size_t bytes = size_of(job.type);
  const vec::f32 offset = vec::set1(job.offset);
  for (std::size_t row = begin; row < end; ++row) {
    const auto g = static_cast<std::ptrdiff_t>(row / job.rows), r = static_cast<std::ptrdiff_t>(row % job.rows);
    const char* in = static_cast<const char*>(job.in) +
                     (g * job.group_stride + r * job.row_stride) * static_cast<std::ptrdiff_t>(bytes);
    char* out = static_cast<char*>(job.out) +
                (g * job.out_group_stride + r * job.out_row_stride) * static_cast<std::ptrdiff_t>(bytes);
    const float mean = sum_of_squares(in, job.type, job.size) / static_cast<float>(job.size);
    const vec::f32 scale = vec::set1(1.0f / __builtin_sqrtf(mean + job.epsilon));
    for (std::size_t i = 0; i < job.size; i += vec::lanes) {
      vec::f32 x = vec::mul(load_padded(in, job.type, i, job.size), scale);
      if (job.round_first) x = round_to(job.type, x);
      x = vec::mul(vec::add(load_padded(job.weight, job.weight_type, i, job.size), offset), x);
      if (i + vec::lanes <= job.size) {
        store_rounded(out, job.type, i, x);
      } else {
        alignas(64) char rest[vec::lanes * 4];
        store_rounded(rest, job.type, 0, x);
        __builtin_memcpy(out + i * bytes, rest, (job.size - i) * bytes);
      }
    }
  }
}
