// Eight lanes: AVX2, FMA, F16C.
struct vec {
  static constexpr int lanes = 8;
  static constexpr int max_rows = 6;
  static constexpr int accumulators = 12;
  static constexpr int tile_vectors(int rows) { return rows <= 3 ? 4 : 2; }

  using f32 = __m256;

  // sum = fma(a, b, sum), in the register that holds the sum: gcc would write sums over factors, and run out of
  // registers.
  static void accumulate(f32& sum, f32 a, f32 b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }

  static f32 zero() { return _mm256_setzero_ps(); }
  static f32 set1(float x) { return _mm256_set1_ps(x); }
  static f32 load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, f32 x) { _mm256_storeu_ps(p, x); }
  static f32 load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static f32 load_bf16(const void* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
  }
  static f32 load_int8(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
  // Of each lane's four signed bytes the one at `place`, as a number.
  template <int place>
  static f32 int8_of(f32 x) {
    const __m256i top = _mm256_slli_epi32(_mm256_castps_si256(x), 24 - 8 * place);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
  }
  static f32 load_e8m0(const void* p) {  // powers of two, from 2^-126 on
    return _mm256_castsi256_ps(_mm256_slli_epi32(bytes_to_ints(static_cast<const char*>(p)), 23));
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
  static f32 times_exp2(f32 x, f32 n) { return mul(x, exp2_integral(max(set1(-127.0f), n))); }
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

  // Of 64 bytes of codes, those of k and columns [8 v, 8 v + 8) in fp32. A code u in the lowest bits of a lane becomes
  // a float by setting the exponent of 2^23 above it, which is 2^23 + u; subtracting is exact.
  static constexpr bool decodes_to_floats = true;

  struct int8_decoder {
    [[gnu::always_inline]] f32 at(const char* codes, int k, int v) const {
      const __m256i x = load_codes(codes, v % 2), zero = _mm256_setzero_si256();
      const __m256i words = v < 2 ? _mm256_unpacklo_epi8(x, zero) : _mm256_unpackhi_epi8(x, zero);
      const __m256i code = k ? _mm256_srli_epi32(words, 16) : _mm256_and_si256(words, _mm256_set1_epi32(255));
      const __m256i sum = _mm256_xor_si256(code, _mm256_set1_epi32(0x4b000080));  // u is the code + 128
      return _mm256_sub_ps(_mm256_castsi256_ps(sum), _mm256_set1_ps(0x1p23f + 128.0f));
    }
  };

  // The bytes of bf16: e4m3 has the same mantissa with fewer bits, and an exponent that is 120 less, but for numbers
  // below 2^-6, which are in tables.
  struct fp8_decoder {
    [[gnu::always_inline]] f32 at(const char* codes, int k, int v) const {
      const __m256i x = load_codes(codes, v % 2);
      const __m256i index = _mm256_min_epu8(_mm256_and_si256(x, _mm256_set1_epi8(0x7f)), _mm256_set1_epi8(8));
      const __m256i exponent = _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(7));
      const __m256i high =
          _mm256_add_epi8(exponent, _mm256_shuffle_epi8(table(0, 59, 59, 59, 60, 60, 60, 60, 60), index));
      const __m256i mantissa = _mm256_and_si256(_mm256_slli_epi16(x, 4), _mm256_set1_epi8(-16));
      const __m256i low = _mm256_xor_si256(
          mantissa, _mm256_shuffle_epi8(table(0, 0x10, -0x60, -0x10, 0x40, 0x70, 0x20, 0x10, 0), index));
      const __m256i top = _mm256_or_si256(high, _mm256_and_si256(x, _mm256_set1_epi8(-128)));
      const __m256i both = v < 2 ? _mm256_unpacklo_epi8(low, top) : _mm256_unpackhi_epi8(low, top);
      return k ? _mm256_castsi256_ps(_mm256_and_si256(both, high_half()))
               : _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    }
  };

  template <bool Zeros>
  struct int4_decoder {
    f32 bias[4];
    explicit int4_decoder(const char* zeros) {
      KT_UNROLLED (v, 4) {
        const f32 power = _mm256_set1_ps(v < 2 ? 0x1p23f : 0x1p19f);
        bias[v] = _mm256_add_ps(power, Zeros ? bytes_to_floats(zeros + 8 * v) : _mm256_set1_ps(8.0f));
      }
    }
    [[gnu::always_inline]] f32 at(const char* codes, int k, int v) const {
      const __m256i two = _mm256_srli_epi32(load_codes(codes, v % 2), k % 2 * 16 + k / 2 * 8);
      const __m256i code = _mm256_and_si256(two, _mm256_set1_epi32(v < 2 ? 0x0f : 0xf0));
      // The upper code stays where it is, below the exponent of 2^19.
      const __m256i sum = _mm256_or_si256(code, _mm256_set1_epi32(v < 2 ? 0x4b000000 : 0x49000000));
      return _mm256_sub_ps(_mm256_castsi256_ps(sum), bias[v]);
    }
  };

  // By a table of values * 2 + 16, which go below the exponent of 16 so that they become 24 + value.
  struct e2m1_decoder {
    [[gnu::always_inline]] f32 at(const char* codes, int k, int v) const {
      const __m256i x = load_codes(codes, v % 2);
      const __m256i index = _mm256_and_si256(v < 2 ? x : _mm256_srli_epi32(x, 4), _mm256_set1_epi8(15));
      const __m256i four =
          _mm256_shuffle_epi8(table(16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4), index);
      const int bit = k % 2 * 16 + k / 2 * 8;
      const __m256i value =
          _mm256_and_si256(bit < 18 ? _mm256_slli_epi32(four, 18 - bit) : _mm256_srli_epi32(four, bit - 18),
                           _mm256_set1_epi32(0x1f << 18));
      const __m256i sum = _mm256_or_si256(value, _mm256_castps_si256(_mm256_set1_ps(16.0f)));
      return _mm256_sub_ps(_mm256_castsi256_ps(sum), _mm256_set1_ps(24.0f));
    }
  };

 private:
  static __m256i load_codes(const char* p, int part) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part);
  }
  // Bytes by index, in both halves.
  template <class... Bytes>
  static __m256i table(Bytes... bytes) {
    static_assert(sizeof...(bytes) <= 16);
    alignas(16) const char all[16] = {static_cast<char>(bytes)...};
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(all)));
  }
  static __m256i bytes_to_ints(const char* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static f32 bytes_to_floats(const char* p) { return _mm256_cvtepi32_ps(bytes_to_ints(p)); }
  static __m256i high_half() { return _mm256_set1_epi32(static_cast<int>(0xffff0000u)); }
};
