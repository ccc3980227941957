// Weights of a tile's positions: kt/attention.h has the formulas.

constexpr float log2_e = 0x1.715476p+0f;
constexpr int row_vectors = attention_tile / vec::lanes;

// 2^n for an integral n up to zero, and zero below 2^-126. NaN stays.
inline float power_of_two(float n) {
  if (n >= -126) return as_f32(static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23);
  return n != n ? n : 0.0f;
}

// A row of a mask as numbers to add.
class mask_row {
 public:
  const float* operator()(const attend_job& job, int r) {
    if (job.mask == mask_type::none) return nullptr;
    if (job.mask_rows[r] == from_) return values_;
    from_ = job.mask_rows[r];
    if (job.mask == mask_type::boolean) {
      const auto* allowed = static_cast<const unsigned char*>(from_);
      for (int j = 0; j < job.count; ++j) values_[j] = allowed[j] ? 0.0f : -__builtin_inff();
      return values_;
    }
    const dtype type = job.mask == mask_type::f32 ? dtype::f32 : job.mask == mask_type::f16 ? dtype::f16 : dtype::bf16;
    with_type(type, [&](auto t) {
      for (int j = 0; j < attention_tile; j += vec::lanes) vec::store(values_ + j, load_part<t()>(from_, j, job.count));
    });
    return values_;
  }

 private:
  const void* from_ = nullptr;
  alignas(64) float values_[attention_tile] = {};
};

template <class V>
float largest(V x) {
  constexpr int lanes = sizeof(V) / 4;
  if constexpr (lanes > 8) x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(8)));
  if constexpr (lanes > 1) {
    x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(4)));
    x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(2)));
    x = vec::max(x, __builtin_shuffle(x, x, shuffles::exchange(1)));
    return x[0];
  } else {
    return x;
  }
}

// Of the lanes of both, one after the other, those that are even, or odd.
template <class V>
[[gnu::always_inline]] inline V every_second(V a, V b, bool odd) {
  if constexpr (sizeof(V) > 4)
    return odd ? __builtin_shuffle(a, b, shuffles::every_second(1))
               : __builtin_shuffle(a, b, shuffles::every_second(0));
  else
    return odd ? b : a;
}

struct alignas(64) places_of_tile {
  float at[attention_tile] = {};
  constexpr places_of_tile() {
    for (int i = 0; i < attention_tile; ++i) at[i] = static_cast<float>(i);
  }
};
inline constexpr places_of_tile places;

// e^score of a row's products is fraction * 2^n. Returns the largest of the n and `most`.
template <class Weights>
[[gnu::always_inline]] inline float split_scores(const attend_job& job, int r, const float* mask, float most,
                                                 vec::f32 (&n)[row_vectors], vec::f32 (&fraction)[row_vectors]) {
  const float* row = job.scores + r * attention_tile;
  const int begin = job.begin[r], end = job.end[r] < job.count ? job.end[r] : job.count;
  const bool whole = begin <= 0 && end == attention_tile, capped = job.softcap > 0;
  const vec::f32 first = vec::set1(static_cast<float>(begin)), last = vec::set1(static_cast<float>(end - 1));
  const vec::f32 lowest = constant(attention_lowest);
  const vec::f32 none = constant(64 * attention_lowest);  // whose weight is zero beside any maximum
  const vec::f32 scale = vec::set1(capped ? job.scale : job.scale * log2_e);
  const vec::f32 cap = vec::set1(job.softcap * log2_e), per_cap = vec::set1(capped ? 1.0f / job.softcap : 0.0f);
  vec::f32 top = vec::set1(most);
  KT_UNROLLED (j, row_vectors) {
    vec::f32 t = vec::mul(vec::load(row + j * vec::lanes), scale);
    if (capped) t = vec::mul(tanh(vec::mul(t, per_cap)), cap);
    if (mask) {
      const vec::f32 m = vec::load(mask + j * vec::lanes);
      t = vec::max(lowest, vec::fma(m, constant(log2_e), t));
      t = vec::select_negative(vec::sub(m, constant(-__FLT_MAX__)), none, t);
    } else {
      t = vec::max(lowest, t);  // the second operand where that is NaN
    }
    if (!whole) {
      const vec::f32 place = vec::load(places.at + j * vec::lanes);
      t = vec::select_negative(vec::sub(place, first), none, vec::select_negative(vec::sub(last, place), none, t));
    }
    n[j] = vec::round(t);
    fraction[j] = Weights::fraction(vec::sub(t, n[j]));
    top = vec::max(n[j], top);
  }
  return largest(top);
}

// Scores become weights, row r at r * Weights::stride from `kept` on; `factor`: by what all that is summed up shrinks.
template <class Weights>
void weigh(const attend_job& job, void* kept, float* factor) {
  mask_row mask;
  for (int r = 0; r < job.rows; ++r) {
    vec::f32 n[row_vectors], p[row_vectors];
    const float most = split_scores<Weights>(job, r, mask(job, r), job.state.max[r], n, p);
    const vec::f32 m = vec::set1(most);
    KT_UNROLLED (j, row_vectors) p[j] = vec::times_exp2(p[j], vec::sub(n[j], m));
    factor[r] = power_of_two(job.state.max[r] - most);
    job.state.max[r] = most;
    Weights::keep(p, static_cast<char*>(kept) + r * Weights::stride, job.state.sums + r * attention_sums, factor[r]);
  }
}

// sums[i] = sums[i] f + p[i] + p[i + 16] + p[i + 32] + p[i + 48]
inline void add_weights(const vec::f32 (&p)[row_vectors], float* sums, float factor) {
  constexpr int vectors = attention_sums / vec::lanes;
  KT_UNROLLED (v, vectors) {
    vec::f32 sum = vec::mul(vec::load(sums + v * vec::lanes), vec::set1(factor));
    KT_UNROLLED (i, row_vectors / vectors) sum = vec::add(sum, p[i * vectors + v]);
    vec::store(sums + v * vec::lanes, sum);
  }
}

struct fp32_weights {
  static constexpr std::size_t stride = attention_tile * sizeof(float);
  static vec::f32 fraction(vec::f32 r) { return exp2_fraction(r); }
  [[gnu::always_inline]] static void keep(const vec::f32 (&p)[row_vectors], char* row, float* sums, float factor) {
    KT_UNROLLED (j, row_vectors) vec::store(reinterpret_cast<float*>(row) + j * vec::lanes, p[j]);
    add_weights(p, sums, factor);
  }
};

// Rounded to bf16, in fp32.
struct rounded_weights {
  static constexpr std::size_t stride = fp32_weights::stride;
  static vec::f32 fraction(vec::f32 r) { return exp2_fraction_for_bf16(r); }
  [[gnu::always_inline]] static void keep(vec::f32 (&p)[row_vectors], char* row, float* sums, float factor) {
    KT_UNROLLED (j, row_vectors) {
      p[j] = vec::round_bf16(p[j]);
      vec::store(reinterpret_cast<float*>(row) + j * vec::lanes, p[j]);
    }
    constexpr int vectors = attention_sums / vec::lanes;
    KT_UNROLLED (v, vectors) {
      vec::f32 sum = vec::mul(vec::load(sums + v * vec::lanes), vec::set1(factor));
      KT_UNROLLED (i, 2) {
        const vec::f32 a = p[2 * (i * vectors + v)], b = p[2 * (i * vectors + v) + 1];
        sum = vec::add(vec::add(sum, every_second(a, b, true)), every_second(a, b, false));
      }
      vec::store(sums + v * vec::lanes, sum);
    }
  }
};
