// One operation on each element, and the softmax of rows.

inline vec::f32 apply(element_op op, vec::f32 a, vec::f32 b) {
  switch (op) {
    case element_op::copy: return a;
    case element_op::add: return vec::add(a, b);
    case element_op::sub: return vec::sub(a, b);
    case element_op::mul: return vec::mul(a, b);
    case element_op::div: return vec::div(a, b);
    case element_op::silu: return times_sigmoid(a, a);
    case element_op::sigmoid: return times_sigmoid(vec::set1(1.0f), a);
    case element_op::gelu_tanh: return gelu_tanh(a);
    case element_op::gelu_erf: return gelu_erf(a);
    case element_op::cos: return sine(a, 1);
    default: return sine(a, 0);
  }
}

void elementwise(const elementwise_job& job, std::size_t begin, std::size_t end) {
  const auto bytes = static_cast<std::ptrdiff_t>(size_of(job.type));
  for (std::size_t row = begin; row < end; ++row) {
    const auto r = static_cast<std::ptrdiff_t>(row);
    const char* a = static_cast<const char*>(job.a) + r * job.a_stride * bytes;
    const char* b = static_cast<const char*>(job.b) + r * job.b_stride * bytes;
    char* out = static_cast<char*>(job.out) + row * job.size * size_of(job.out_type);
    vec::f32 second = vec::set1(job.number);
    if (job.b && job.b_single) {
      alignas(64) float one[vec::lanes];
      vec::store(one, load_padded(b, job.type, 0, 1));
      second = vec::set1(one[0]);
    }
    for (std::size_t i = 0; i < job.size; i += vec::lanes) {
      if (job.b && !job.b_single) second = load_padded(b, job.type, i, job.size);
      store_padded(out, job.out_type, i, job.size, apply(job.op, load_padded(a, job.type, i, job.size), second));
    }
  }
}

// Elements beyond the end of a row are the lowest float, whose exponential is zero.
inline vec::f32 load_or_lowest(const void* row, dtype type, std::size_t i, std::size_t size) {
  if (i + vec::lanes <= size) return load_as_f32(row, type, i);
  alignas(64) float all[vec::lanes];
  vec::store(all, load_padded(row, type, i, size));
  for (std::size_t j = i < size ? size - i : 0; j < vec::lanes; ++j) all[j] = -__FLT_MAX__;
  return vec::load(all);
}

void softmax(const softmax_job& job, std::size_t begin, std::size_t end) {
  constexpr int partial = 32, vectors = partial / vec::lanes;
  for (std::size_t row = begin; row < end; ++row) {
    const char* in = static_cast<const char*>(job.in) +
                     static_cast<std::ptrdiff_t>(row) * job.stride * static_cast<std::ptrdiff_t>(size_of(job.type));
    float* out = job.out + row * job.size;
    alignas(64) float all[partial];
    vec::f32 high = vec::set1(-__FLT_MAX__);
    for (std::size_t i = 0; i < job.size; i += vec::lanes)
      high = vec::max(high, load_or_lowest(in, job.type, i, job.size));
    vec::store(all, high);
    float most = all[0];
    for (int i = 1; i < vec::lanes; ++i) most = most < all[i] ? all[i] : most;
    vec::f32 sums[vectors];
    for (vec::f32& sum : sums) sum = vec::zero();
    for (std::size_t i = 0; i < job.size; i += partial)
      KT_UNROLLED (v, vectors) {
        const std::size_t at = i + v * vec::lanes;
        const vec::f32 e = exp_up_to_one(vec::sub(load_or_lowest(in, job.type, at, job.size), vec::set1(most)));
        if (at < job.size) store_padded(out, dtype::f32, at, job.size, e);
        sums[v] = vec::add(sums[v], e);
      }
    KT_UNROLLED (v, vectors) vec::store(all + v * vec::lanes, sums[v]);
    for (int half = partial / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) all[i] += all[i + half];
    const vec::f32 sum = vec::set1(all[0]);
    for (std::size_t i = 0; i < job.size; i += vec::lanes)
      store_padded(out, dtype::f32, i, job.size, vec::div(load_padded(out, dtype::f32, i, job.size), sum));
  }
}
