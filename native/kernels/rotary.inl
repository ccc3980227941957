// a' = a c - b s, b' = b c + a s

inline void rotate_row(const char* in, dtype type, std::size_t half, const char* cos, const char* sin, char* out) {
  const std::size_t second = half * size_of(type);
  for (std::size_t i = 0; i < half; i += vec::lanes) {
    const vec::f32 a = load_padded(in, type, i, half), b = load_padded(in + second, type, i, half);
    const auto product = [&](vec::f32 x, const char* angles) {
      return round_to(type, vec::mul(x, load_padded(angles, type, i, half)));
    };
    const vec::f32 minus_b = vec::sub(vec::set1(-0.0f), b);
    const vec::f32 first = vec::add(product(a, cos), product(minus_b, sin));
    const vec::f32 other = vec::add(product(b, cos + second), product(a, sin + second));
    store_padded(out, type, i, half, first);
    store_padded(out + second, type, i, half, other);
  }
}

void rotary(const rotary_job& job, std::size_t begin, std::size_t end) {
  const std::size_t bytes = size_of(job.type);
  for (std::size_t row = begin; row < end; ++row) {
    const std::size_t position = row / job.heads;
    const auto h = static_cast<std::ptrdiff_t>(row % job.heads);
    const auto p = static_cast<std::ptrdiff_t>(position % job.positions);
    const auto s = static_cast<std::ptrdiff_t>(position / job.positions);
    const auto place = [&](const std::ptrdiff_t (&strides)[3]) {
      return (s * strides[0] + p * strides[1] + h * strides[2]) * static_cast<std::ptrdiff_t>(bytes);
    };
    const char* in = static_cast<const char*>(job.in) + place(job.in_strides);
    char* out = static_cast<char*>(job.out) + place(job.out_strides);
    const std::ptrdiff_t angle =
        (s * job.angle_strides[0] + p * job.angle_strides[1]) * static_cast<std::ptrdiff_t>(bytes);
    if (job.norm.values)
      norm_row(in, job.type, job.size, job.norm, out);
    else
      __builtin_memcpy(out + job.rotated * bytes, in + job.rotated * bytes, (job.size - job.rotated) * bytes);
    rotate_row(job.norm.values ? out : in, job.type, job.rotated / 2, static_cast<const char*>(job.cos) + angle,
               static_cast<const char*>(job.sin) + angle, out);
  }
}
