// Products of int8 codes on AVX2: with AVX-VNNI as it is, without it by way of 16-bit sums of two products, which hold
// the greatest (127 * 127 * 2) since neither side is ever -128.
struct dot {
  using i32 = __m256i;
  static constexpr int tile_vectors(int rows) { return rows <= 3 ? 4 : 2; }

  static i32 zero() { return _mm256_setzero_si256(); }
  static i32 load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, i32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static i32 set1(std::uint32_t four) { return _mm256_set1_epi32(static_cast<int>(four)); }
  static i32 sub(i32 a, i32 b) { return _mm256_sub_epi32(a, b); }
  static vec::f32 to_float(i32 x) { return _mm256_cvtepi32_ps(x); }

#ifdef __AVXVNNI__
  static constexpr bool unsigned_rows = true;
  using weights = __m256i;
  static weights prepare(const char* p) { return load(p); }
  static weights prepare(i32 x) { return x; }
  static i32 add(i32 acc, i32 x, weights w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
#else
  static constexpr bool unsigned_rows = false;
  struct weights {
    __m256i code, magnitude;
  };
  static weights prepare(const char* p) { return prepare(load(p)); }
  static weights prepare(i32 x) { return {x, _mm256_abs_epi8(x)}; }
  static i32 add(i32 acc, i32 x, weights w) {
    const __m256i two = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.code));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
  }
#endif
};
