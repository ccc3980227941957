// The bytes of bf16 integers.
struct alignas(16) int4_bytes {
  std::uint8_t low[16] = {}, high[16] = {};
  constexpr int4_bytes() {
    for (int i = 0; i < 16; ++i) {
      low[i] = static_cast<std::uint8_t>(as_u32(static_cast<float>(i)) >> 16);
      high[i] = static_cast<std::uint8_t>(as_u32(static_cast<float>(i)) >> 24);
    }
  }
};
inline constexpr int4_bytes int4_magnitudes{};

// Eight lanes: AVX2, FMA, F16C.
struct vec {
  static constexpr int lanes = 8;
  static constexpr int max_rows = 6;
  static constexpr int accumulators = 12;
  static constexpr int tile_vectors(int rows) { return rows <= 3 ? 4 : 2; }

  using f32 = __m256;

  static f32 zero() { return _mm256_setzero_ps(); }
  static f32 set1(float x) { return _mm256_set1_ps(x); }
  static f32 load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, f32 x) { _mm256_storeu_ps(p, x); }
  static f32 load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static f32 load_bf16(const void* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
  }
  static f32 bf16_even(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)), 16));
  }
  static f32 bf16_odd(const void* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), high_half()));
  }
  static void store_f16(void* p, f32 x) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bf16(void* p, f32 x) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(x)), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  static f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
  static f32 add(f32 a, f32 b) { return _mm256_add_ps(a, b); }
  static f32 sub(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
  static f32 mul(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
  static f32 div(f32 a, f32 b) { return _mm256_div_ps(a, b); }
  static f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
  static f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
  static f32 abs(f32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static f32 select_negative(f32 sign, f32 negative, f32 other) { return _mm256_blendv_ps(other, negative, sign); }
  static f32 round(f32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static f32 exp2_integral(f32 n) {
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_blendv_ps(_mm256_castsi256_ps(e), n, _mm256_cmp_ps(n, n, _CMP_UNORD_Q));
  }
  static f32 round_bf16(f32 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
    const __m256 r =
        _mm256_blendv_ps(_mm256_castsi256_ps(near), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(r), high_half()));
  }

  static void store_int8(void* p, f32 x) {
    const __m256i i = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }

  // 64 bytes of codes to bf16 in the layout of bf16 panels (kt/layout.h).
  struct int8_decoder {
    void operator()(const char* codes, char* out) const {
      const __m256i zero = _mm256_setzero_si256();
      KT_UNROLLED (part, 2) {  // codes in the upper bytes of words
        const __m256i x = load_codes(codes, part);
        put(_mm256_unpacklo_epi8(zero, x), out + 32 * part);
        put(_mm256_unpackhi_epi8(zero, x), out + 64 + 32 * part);
      }
    }

   private:
    static void put(__m256i words, char* out) {
      const __m256i even = as_float(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 24));
      const __m256i odd = as_float(_mm256_srai_epi32(words, 24));
      store_codes(out, _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
    }
    static __m256i as_float(__m256i i) { return _mm256_castps_si256(_mm256_cvtepi32_ps(i)); }
  };

  // e4m3 is fp16 with fewer bits, times 2^8.
  struct fp8_decoder {
    void operator()(const char* codes, char* out) const {
      const __m256i zero = _mm256_setzero_si256();
      KT_UNROLLED (part, 2) {
        const __m256i x = load_codes(codes, part);
        put(_mm256_unpacklo_epi8(zero, x), out + 32 * part);
        put(_mm256_unpackhi_epi8(zero, x), out + 64 + 32 * part);
      }
    }

   private:
    static void put(__m256i upper, char* out) {  // codes in the upper bytes of words
      const __m256i magnitude = _mm256_and_si256(_mm256_srli_epi16(upper, 1), _mm256_set1_epi16(0x3f80));
      const __m256i half = _mm256_or_si256(magnitude, _mm256_and_si256(upper, _mm256_set1_epi16(-0x8000)));
      const __m256i low = high_words(_mm256_castsi256_si128(half));
      const __m256i high = high_words(_mm256_extracti128_si256(half, 1));
      store_codes(out, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
    }
  };

  // The bytes of a bf16 integer come from two tables, by its magnitude.
  template <bool Zeros>
  struct int4_decoder {
    __m256i low, high, zero[4];
    explicit int4_decoder(const char* zeros) {
      low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(int4_magnitudes.low)));
      high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(int4_magnitudes.high)));
      KT_UNROLLED (part, 4) {  // columns [8 part, 8 part + 8)
        zero[part] = _mm256_set1_epi16(8);
        if constexpr (Zeros) {
          const __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * part)));
          zero[part] = _mm256_or_si256(z, _mm256_slli_epi32(z, 16));
        }
      }
    }
    void operator()(const char* codes, char* out) const {
      KT_UNROLLED (part, 2) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + part);
        KT_UNROLLED (i, 4) {
          const __m256i code = _mm256_and_si256(_mm256_srli_epi16(x, 4 * i), _mm256_set1_epi16(15));
          const __m256i value = _mm256_sub_epi16(code, zero[i % 2 * 2 + part]);
          // The upper byte of each index reads beyond the table, as zero.
          const __m256i index = _mm256_or_si256(_mm256_abs_epi16(value), _mm256_set1_epi16(-0x8000));
          const __m256i bits =
              _mm256_or_si256(_mm256_shuffle_epi8(low, index), _mm256_slli_epi16(_mm256_shuffle_epi8(high, index), 8));
          const __m256i sign = _mm256_and_si256(value, _mm256_set1_epi16(-0x8000));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 2 * i + part, _mm256_or_si256(bits, sign));
        }
      }
    }
  };

  // e2m1 times a power of two, which is added to the exponents of what is not zero.
  struct mxfp4_decoder {
    __m256i low, high, exponent[4];
    explicit mxfp4_decoder(const char* scales) {
      low = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
      high = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, -128, -65, -65, -65, -64, -64, -64, -64));
      KT_UNROLLED (part, 4) {
        const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + 8 * part)));
        const __m256i both = _mm256_or_si256(e, _mm256_slli_epi32(e, 16));
        exponent[part] = _mm256_slli_epi16(_mm256_sub_epi16(both, _mm256_set1_epi16(127)), 7);
      }
    }
    void operator()(const char* codes, char* out) const {
      KT_UNROLLED (part, 2) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + part);
        KT_UNROLLED (i, 4) {
          const __m256i code = _mm256_and_si256(_mm256_srli_epi16(x, 4 * i), _mm256_set1_epi16(15));
          const __m256i index = _mm256_or_si256(code, _mm256_set1_epi16(-0x8000));
          const __m256i bits =
              _mm256_or_si256(_mm256_shuffle_epi8(low, index), _mm256_slli_epi16(_mm256_shuffle_epi8(high, index), 8));
          const __m256i zero =
              _mm256_cmpeq_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)), _mm256_setzero_si256());
          const __m256i y = _mm256_add_epi16(bits, _mm256_andnot_si256(zero, exponent[i % 2 * 2 + part]));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 2 * i + part, y);
        }
      }
    }
  };

 private:
  static __m256i load_codes(const char* p, int part) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part);
  }
  static void store_codes(char* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  // The upper halves of fp16 numbers times 2^8 in fp32.
  static __m256i high_words(__m128i f16) {
    const __m256 x = _mm256_mul_ps(_mm256_cvtph_ps(f16), _mm256_set1_ps(256.0f));
    return _mm256_srli_epi32(_mm256_castps_si256(x), 16);
  }
  static __m256i high_half() { return _mm256_set1_epi32(static_cast<int>(0xffff0000u)); }
};
