// Products of int8 codes on AVX2: with AVX-VNNI as it is, without it by way of 16-bit sums of two products, which hold
// the greatest (127 * 127 * 2) since neither side is ever -128.
struct dot {
  using i32 = __m256i;
  static constexpr int tile_vectors(int rows) { return rows <= 3 ? 4 : 2; }

  static i32 zero() { return _mm256_setzero_si256(); }
  static i32 load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, i32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static i32 set1(std::uint32_t four) { return _mm256_set1_epi32(static_cast<int>(four)); }
  static i32 add(i32 a, i32 b) { return _mm256_add_epi32(a, b); }
  static i32 sub(i32 a, i32 b) { return _mm256_sub_epi32(a, b); }
  static vec::f32 to_float(i32 x) { return _mm256_cvtepi32_ps(x); }

  // Products of codes of four bits, 0 to 15 less a zero point, with signed ones. `sums` holds those of 32 k. A row
  // brings the sums of its codes of even and of odd k, negative, times which the zero points are added at first.
  static constexpr int int4_loads(int rows) { return rows <= 2 ? 2 : 1; }
  static constexpr int int4_rows = 6;
  static i32 low_codes(const char* p) { return _mm256_and_si256(load(p), _mm256_set1_epi8(15)); }
  static i32 high_codes(const char* p) { return _mm256_and_si256(_mm256_srli_epi16(load(p), 4), _mm256_set1_epi8(15)); }
  using sums = __m256i;

#ifdef __AVXVNNI__
  static constexpr bool unsigned_rows = true;
  using weights = __m256i;
  static weights prepare(const char* p) { return load(p); }
  static weights prepare(i32 x) { return x; }
  static i32 add(i32 acc, i32 x, weights w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
  static sums add_int4(sums acc, i32 x, i32 codes) { return _mm256_dpbusd_avx_epi32(acc, codes, x); }
  static i32 total(sums acc) { return acc; }
  static constexpr bool sums_last = true;
  static std::uint32_t int4_sum(int even, int odd) { return static_cast<std::uint32_t>(-even - odd); }
  static sums int4_start(i32 row) { return _mm256_slli_epi32(row, 3); }
  static sums int4_start(i32 row, const char* zeros) { return _mm256_mullo_epi32(row, zero_points(zeros)); }
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
  // Sixteen bits, which hold the 16 * 15 * 127 of even or odd k, and on the way there may wrap.
  static sums add_int4(sums acc, i32 x, i32 codes) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x)); }
  static i32 total(sums acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
  static constexpr bool sums_last = false;
  static std::uint32_t int4_sum(int even, int odd) {
    return (static_cast<std::uint32_t>(-even) & 0xffffu) | static_cast<std::uint32_t>(-odd) << 16;
  }
  static sums int4_start(i32 row) { return _mm256_slli_epi16(row, 3); }
  static sums int4_start(i32 row, const char* zeros) {
    const __m256i z = zero_points(zeros);
    return _mm256_mullo_epi16(row, _mm256_or_si256(z, _mm256_slli_epi32(z, 16)));
  }
#endif

 private:
  static i32 zero_points(const char* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
};
