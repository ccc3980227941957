// The bytes of a bf16 number come from two tables of 128, by magnitude.
struct alignas(64) byte_tables {
  std::uint8_t low[128], high[128];
  template <class F>
  constexpr explicit byte_tables(F value) : low(), high() {
    for (int i = 0; i < 128; ++i) {
      const std::uint32_t bits = as_u32(value(i)) >> 16;
      low[i] = static_cast<std::uint8_t>(bits);
      high[i] = static_cast<std::uint8_t>(bits >> 8);
    }
  }
};

// The integers that four bits stand for, in bf16: those of five bits and a sign with zero points.
template <bool Zeros>
struct alignas(64) int4_table {
  std::uint16_t bf16[32] = {};
  constexpr int4_table() {
    for (int i = 0; i < 32; ++i) {
      const int value = Zeros ? (i < 16 ? i : i - 32) : i % 16 - 8;
      bf16[i] = static_cast<std::uint16_t>(as_u32(static_cast<float>(value)) >> 16);
    }
  }
};

inline constexpr byte_tables int8_tables{[](int i) { return static_cast<float>(i); }};
inline constexpr byte_tables fp8_tables{e4m3_to_f32};
template <bool Zeros>
inline constexpr int4_table<Zeros> int4_values{};

// Sixteen lanes: AVX-512 F, BW, DQ, VL.
struct vec {
  static constexpr int lanes = 16;
  static constexpr int max_rows = 12;
  static constexpr int accumulators = 24;
  static constexpr int tile_vectors(int) { return 2; }

  using f32 = __m512;

  static void accumulate(f32& sum, f32 a, f32 b) { sum = fma(a, b, sum); }

  static f32 zero() { return _mm512_setzero_ps(); }
  static f32 set1(float x) { return _mm512_set1_ps(x); }
  static f32 load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, f32 x) { _mm512_storeu_ps(p, x); }
  static f32 load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  static f32 load_bf16(const void* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
  }
  static f32 load_int8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  // Of each lane's four signed bytes the one at `place`, as a number.
  template <int place>
  static f32 int8_of(f32 x) {
    const __m512i top = _mm512_slli_epi32(_mm512_castps_si512(x), 24 - 8 * place);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
  }
  static f32 load_e8m0(const void* p) {  // powers of two, from 2^-126 on
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 23));
  }
  static f32 bf16_even(const void* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static f32 bf16_odd(const void* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high_half()));
  }
  static void store_f16(void* p, f32 x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bf16(void* p, f32 x) { store_high(p, round_bf16(x)); }
  static void store_high(void* p, f32 x) {
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }

  static f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
  static f32 add(f32 a, f32 b) { return _mm512_add_ps(a, b); }
  static f32 sub(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
  static f32 mul(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
  static f32 div(f32 a, f32 b) { return _mm512_div_ps(a, b); }
  static f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in gcc 12's own header
  static f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
  // Of integral n up to 127: x 2^n, zero where that is below the normal numbers.
  static f32 times_exp2(f32 x, f32 n) { return _mm512_scalef_ps(x, n); }
#pragma GCC diagnostic pop
  static f32 abs(f32 a) { return _mm512_abs_ps(a); }
  static f32 select_negative(f32 sign, f32 negative, f32 other) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign)), other, negative);
  }
  static f32 round(f32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static f32 exp2_integral(f32 n) {
    const __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(n, n, _CMP_UNORD_Q), _mm512_castsi512_ps(e), n);
  }
  static f32 round_bf16(f32 x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x00400000));
    const __m512i r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), near, quiet);
    return _mm512_castsi512_ps(_mm512_and_si512(r, high_half()));
  }

  static void store_int8(void* p, f32 x) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }

  // 64 bytes of codes to bf16 in the layout of bf16 panels (kt/layout.h).
  static constexpr bool decodes_to_floats = false;  // else decoders have `at`, as in vec_avx2.h

#ifdef __AVX512VBMI__
  struct byte_decoder {
    __m512i low[2], high[2];
    explicit byte_decoder(const byte_tables& t) {
      KT_UNROLLED (i, 2) {
        low[i] = _mm512_load_si512(t.low + 64 * i);
        high[i] = _mm512_load_si512(t.high + 64 * i);
      }
    }
    void put(__m512i magnitude, __m512i sign, char* out) const {
      const __m512i l = _mm512_permutex2var_epi8(low[0], magnitude, low[1]);
      const __m512i h = _mm512_permutex2var_epi8(high[0], magnitude, high[1]);
      const __m512i s = _mm512_ternarylogic_epi32(h, sign, _mm512_set1_epi8(-128), 0xf8);  // h | (sign & 0x80)
      _mm512_storeu_si512(out, _mm512_unpacklo_epi8(l, s));
      _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi8(l, s));
    }
  };
  struct int8_decoder : byte_decoder {
    int8_decoder() : byte_decoder(int8_tables) {}
    void operator()(const char* codes, char* out) const {
      const __m512i x = _mm512_loadu_si512(codes);
      put(_mm512_max_epi8(x, _mm512_sub_epi8(_mm512_setzero_si512(), x)), x, out);  // VPABSB waits for FMA on Zen 4
    }
  };
  struct fp8_decoder : byte_decoder {
    fp8_decoder() : byte_decoder(fp8_tables) {}
    void operator()(const char* codes, char* out) const {
      const __m512i x = _mm512_loadu_si512(codes);
      put(x, x, out);
    }
  };
#else
  struct int8_decoder {
    void operator()(const char* codes, char* out) const {
      const __m512i x = _mm512_loadu_si512(codes), zero = _mm512_setzero_si512();
      put(_mm512_unpacklo_epi8(zero, x), out);  // codes in the upper bytes of words
      put(_mm512_unpackhi_epi8(zero, x), out + 64);
    }

   private:
    static void put(__m512i words, char* out) {
      const __m512i even = as_float(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 24));
      const __m512i odd = as_float(_mm512_srai_epi32(words, 24));
      _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd));
    }
    static __m512i as_float(__m512i i) { return _mm512_castps_si512(_mm512_cvtepi32_ps(i)); }
  };

  // e4m3: exponent and mantissa move to their places and the exponent's bias changes; denormals by a table.
  struct fp8_decoder {
    void operator()(const char* codes, char* out) const {
      const __m512i x = _mm512_loadu_si512(codes), zero = _mm512_setzero_si512();
      put(_mm512_unpacklo_epi8(x, zero), out);
      put(_mm512_unpackhi_epi8(x, zero), out + 64);
    }

   private:
    static void put(__m512i x, char* out) {
      const __m512i denormals =
          _mm512_broadcast_i32x4(_mm_setr_epi16(0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
      const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(0x07f0));
      __m512i y = _mm512_add_epi16(moved, _mm512_set1_epi16(0x3c00));
      y = _mm512_mask_permutexvar_epi16(y, _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78)), x, denormals);
      // y | (x << 8 & 0x8000)
      y = _mm512_ternarylogic_epi32(y, _mm512_slli_epi16(x, 8), _mm512_set1_epi16(-0x8000), 0xf8);
      _mm512_storeu_si512(out, y);
    }
  };
#endif

  // Two codes are two words here: those of zero points become the place in a table of all differences.
  template <bool Zeros>
  struct int4_decoder {
    __m512i table, zero[2];
    explicit int4_decoder(const char* zeros) {
      table = _mm512_load_si512(int4_values<Zeros>.bf16);
      if constexpr (Zeros)
        KT_UNROLLED (half, 2) zero[half] = twice_bytes(zeros, half);
    }
    void operator()(const char* codes, char* out) const {
      const __m512i x = _mm512_loadu_si512(codes);
      KT_UNROLLED (i, 4) {
        __m512i index = _mm512_srli_epi16(x, 4 * i);
        if constexpr (Zeros) index = _mm512_sub_epi16(_mm512_and_si512(index, _mm512_set1_epi16(15)), zero[i % 2]);
        _mm512_storeu_si512(out + 64 * i, _mm512_permutexvar_epi16(index, table));  // of the low five bits
      }
    }
  };

  struct e2m1_decoder {
    void operator()(const char* codes, char* out) const {
      const __m512i x = _mm512_loadu_si512(codes), table = e2m1_values();
      KT_UNROLLED (i, 4)
        _mm512_storeu_si512(out + 64 * i, _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4 * i), table));
    }
  };

  // e2m1 times a power of two, which is added to the exponents of what is not zero.
  struct scaled_e2m1_decoder {
    __m512i exponent[2];
    explicit scaled_e2m1_decoder(const char* scales) {
      KT_UNROLLED (half, 2)
        exponent[half] = _mm512_slli_epi16(_mm512_sub_epi16(twice_bytes(scales, half), _mm512_set1_epi16(127)), 7);
    }
    void operator()(const char* codes, char* out) const {
      const __m512i x = _mm512_loadu_si512(codes), table = e2m1_values();
      KT_UNROLLED (i, 4) {
        const __m512i y = _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4 * i), table);
        const __mmask32 nonzero = _mm512_test_epi16_mask(y, _mm512_set1_epi16(0x7fff));
        _mm512_storeu_si512(out + 64 * i, _mm512_mask_add_epi16(y, nonzero, y, exponent[i % 2]));
      }
    }
  };

 private:
  // The bytes of sixteen columns, each as two words.
  static __m512i twice_bytes(const char* p, int half) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + half));
    return _mm512_or_si512(x, _mm512_slli_epi32(x, 16));
  }
  // In bf16, twice.
  static __m512i e2m1_values() {
    return _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, -0x8000, static_cast<short>(0xbf00),
        static_cast<short>(0xbf80), static_cast<short>(0xbfc0), static_cast<short>(0xc000), static_cast<short>(0xc040),
        static_cast<short>(0xc080), static_cast<short>(0xc0c0)));
  }
  static __m512i high_half() { return _mm512_set1_epi32(static_cast<int>(0xffff0000u)); }
};
