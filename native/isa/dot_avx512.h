// Products of int8 codes on AVX-512: with VNNI as it is, without it by way of 16-bit sums of two products, which hold
// the greatest (127 * 127 * 2) since neither side is ever -128.
struct dot {
  using i32 = __m512i;
  static constexpr int tile_vectors(int) { return 2; }

  static i32 zero() { return _mm512_setzero_si512(); }
  static i32 load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, i32 x) { _mm512_storeu_si512(p, x); }
  static i32 set1(std::uint32_t four) { return _mm512_set1_epi32(static_cast<int>(four)); }
  static i32 add(i32 a, i32 b) { return _mm512_add_epi32(a, b); }
  static i32 sub(i32 a, i32 b) { return _mm512_sub_epi32(a, b); }
  static vec::f32 to_float(i32 x) { return _mm512_cvtepi32_ps(x); }

  // Products of codes of four bits, 0 to 15 less a zero point, with signed ones. `sums` holds those of 32 k. A row
  // brings the sums of its codes of even and of odd k, negative, times which the zero points are added at first.
  static constexpr int int4_loads(int) { return 1; }
  static constexpr int int4_rows = 6;
  static i32 low_codes(const char* p) { return _mm512_and_si512(load(p), _mm512_set1_epi8(15)); }
  static i32 high_codes(const char* p) { return _mm512_and_si512(_mm512_srli_epi16(load(p), 4), _mm512_set1_epi8(15)); }
  using sums = __m512i;

#ifdef __AVX512VNNI__
  static constexpr bool unsigned_rows = true;
  using weights = __m512i;
  static weights prepare(const char* p) { return load(p); }
  static weights prepare(i32 x) { return x; }
  static i32 add(i32 acc, i32 x, weights w) { return _mm512_dpbusd_epi32(acc, x, w); }
  static sums add_int4(sums acc, i32 x, i32 codes) { return _mm512_dpbusd_epi32(acc, codes, x); }
  static i32 total(sums acc) { return acc; }
  static constexpr bool sums_last = true;
  static std::uint32_t int4_sum(int even, int odd) { return static_cast<std::uint32_t>(-even - odd); }
  static sums int4_start(i32 row) { return _mm512_slli_epi32(row, 3); }
  static sums int4_start(i32 row, const char* zeros) { return _mm512_mullo_epi32(row, zero_points(zeros)); }
#else
  static constexpr bool unsigned_rows = false;
  struct weights {
    __m512i magnitude;
    __mmask64 negative;
  };
  static weights prepare(const char* p) { return prepare(load(p)); }
  static weights prepare(i32 x) { return {_mm512_abs_epi8(x), _mm512_movepi8_mask(x)}; }
  static i32 add(i32 acc, i32 x, weights w) {
    const __m512i signed_x = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
    const __m512i two = _mm512_maddubs_epi16(w.magnitude, signed_x);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(two, _mm512_set1_epi16(1)));
  }
  // Sixteen bits, which hold the 16 * 15 * 127 of even or odd k, and on the way there may wrap.
  static sums add_int4(sums acc, i32 x, i32 codes) { return _mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, x)); }
  static i32 total(sums acc) { return _mm512_madd_epi16(acc, _mm512_set1_epi16(1)); }
  static constexpr bool sums_last = false;
  static std::uint32_t int4_sum(int even, int odd) {
    return (static_cast<std::uint32_t>(-even) & 0xffffu) | static_cast<std::uint32_t>(-odd) << 16;
  }
  static sums int4_start(i32 row) { return _mm512_slli_epi16(row, 3); }
  static sums int4_start(i32 row, const char* zeros) {
    const __m512i z = zero_points(zeros);
    return _mm512_mullo_epi16(row, _mm512_or_si512(z, _mm512_slli_epi32(z, 16)));
  }
#endif

 private:
  static i32 zero_points(const char* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};
