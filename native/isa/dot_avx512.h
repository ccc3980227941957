// Products of int8 codes on AVX-512: with VNNI as it is, without it by way of 16-bit sums of two products, which hold
// the greatest (127 * 127 * 2) since neither side is ever -128.
struct dot {
  using i32 = __m512i;
  static constexpr int tile_vectors(int) { return 2; }

  static i32 zero() { return _mm512_setzero_si512(); }
  static i32 load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, i32 x) { _mm512_storeu_si512(p, x); }
  static i32 set1(std::uint32_t four) { return _mm512_set1_epi32(static_cast<int>(four)); }
  static i32 sub(i32 a, i32 b) { return _mm512_sub_epi32(a, b); }
  static vec::f32 to_float(i32 x) { return _mm512_cvtepi32_ps(x); }

#ifdef __AVX512VNNI__
  static constexpr bool unsigned_rows = true;
  using weights = __m512i;
  static weights prepare(const char* p) { return load(p); }
  static weights prepare(i32 x) { return x; }
  static i32 add(i32 acc, i32 x, weights w) { return _mm512_dpbusd_epi32(acc, x, w); }
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
#endif
};
