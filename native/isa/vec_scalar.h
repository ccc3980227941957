// One lane: the definition of what the vector kernels compute, on any CPU. Not made for speed.
struct vec {
  static constexpr int lanes = 1;
  static constexpr int max_rows = 4;
  static constexpr int accumulators = 0;
  static constexpr int tile_vectors(int) { return 4; }

  using f32 = float;
  using i32 = std::int32_t;

  static void accumulate(f32& sum, f32 a, f32 b) { sum = fma(a, b, sum); }

  static f32 zero() { return 0.0f; }
  static f32 set1(float x) { return x; }
  static f32 load(const float* p) { return *p; }
  static void store(float* p, f32 x) { *p = x; }
  static f32 load_f16(const void* p) { return f16_to_f32(bits16(p)); }
  static f32 load_bf16(const void* p) { return bf16_even(p); }
  static f32 load_int8(const void* p) { return *static_cast<const signed char*>(p); }
  // Of four signed bytes the one at `place`, as a number.
  template <int place>
  static f32 int8_of(f32 x) {
    return static_cast<signed char>(as_u32(x) >> 8 * place & 0xff);
  }
  static f32 load_e8m0(const void* p) {  // powers of two, from 2^-126 on
    return as_f32(static_cast<std::uint32_t>(*static_cast<const unsigned char*>(p)) << 23);
  }
  static f32 bf16_even(const void* p) { return as_f32(static_cast<std::uint32_t>(bits16(p)) << 16); }
  static f32 bf16_odd(const void* p) { return bf16_even(static_cast<const char*>(p) + 2); }
  static void store_f16(void* p, f32 x) { put16(p, f32_to_f16(x)); }
  static void store_bf16(void* p, f32 x) { store_high(p, round_bf16(x)); }
  // The upper halves: numbers that are rounded to bf16.
  static void store_high(void* p, f32 x) { put16(p, as_u32(x) >> 16); }

  static f32 fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
  static f32 add(f32 a, f32 b) { return a + b; }
  static f32 sub(f32 a, f32 b) { return a - b; }
  static f32 mul(f32 a, f32 b) { return a * b; }
  static f32 div(f32 a, f32 b) { return a / b; }
  // As on x86: the second operand where one is NaN.
  static f32 min(f32 a, f32 b) { return a < b ? a : b; }
  static f32 max(f32 a, f32 b) { return a > b ? a : b; }
  static f32 abs(f32 a) { return as_f32(as_u32(a) & 0x7fffffffu); }
  static f32 select_negative(f32 sign, f32 negative, f32 other) { return as_u32(sign) >> 31 ? negative : other; }
  static f32 round(f32 a) { return __builtin_nearbyintf(a); }
  // 2^n for an integral n in [-126, 127]; 0 for -127, infinity for 128
  static f32 exp2_integral(f32 n) {
    return n == n ? as_f32(static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23) : n;
  }
  static f32 times_exp2(f32 x, f32 n) { return mul(x, exp2_integral(max(set1(-127.0f), n))); }
  static f32 round_bf16(f32 x) {
    const std::uint32_t u = as_u32(x);
    if (x != x) return as_f32((u | 0x00400000u) & 0xffff0000u);
    return as_f32((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u);
  }

  static void store_int8(void* p, f32 x) { *static_cast<std::int8_t*>(p) = static_cast<std::int8_t>(x); }

  // 64 bytes of codes to bf16 in the layout of bf16 panels (kt/layout.h).
  static constexpr bool decodes_to_floats = false;  // else decoders have `at`, as in vec_avx2.h

  struct int8_decoder {
    void operator()(const char* codes, char* out) const {
      decode2(codes, out, [](char code) { return static_cast<float>(static_cast<signed char>(code)); });
    }
  };
  struct fp8_decoder {
    void operator()(const char* codes, char* out) const {
      decode2(codes, out, [](char code) { return e4m3_to_f32(static_cast<unsigned char>(code)); });
    }
  };

  template <bool Zeros>
  struct int4_decoder {
    const char* zeros;
    explicit int4_decoder(const char* z) : zeros(z) {}
    void operator()(const char* codes, char* out) const {
      decode4(codes, out, [this](unsigned code, int column) {
        return as_u32(static_cast<float>(static_cast<int>(code) - (Zeros ? zeros[column] : 8)));
      });
    }
  };
  struct e2m1_decoder {
    void operator()(const char* codes, char* out) const {
      decode4(codes, out, [](unsigned code, int) { return as_u32(e2m1(code)); });
    }
  };
  struct scaled_e2m1_decoder {  // times powers of two
    const char* scales;
    explicit scaled_e2m1_decoder(const char* s) : scales(s) {}
    void operator()(const char* codes, char* out) const {
      decode4(codes, out,
              [this](unsigned code, int column) { return as_u32(e2m1(code) * load_e8m0(scales + column)); });
    }
  };

 private:
  static float e2m1(unsigned code) {
    constexpr float magnitudes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return code & 8u ? -magnitudes[code & 7u] : magnitudes[code & 7u];
  }
  template <class F>
  static void decode2(const char* codes, char* out, F value) {
    for (int i = 0; i < 64; ++i) {
      const int column = i / 16 * 4 + i / 8 % 2 * 16 + i / 2 % 4;
      put16(out + (column * 2 + i % 2) * 2, as_u32(value(codes[i])) >> 16);
    }
  }
  template <class F>
  static void decode4(const char* codes, char* out, F bits) {
    for (int word = 0; word < 32; ++word)
      for (int i = 0; i < 4; ++i) {
        const int column = i % 2 * 16 + word / 2, pair = i / 2;
        const unsigned code = static_cast<unsigned>(bits16(codes + word * 2)) >> 4 * i & 15u;
        put16(out + ((pair * 32 + column) * 2 + word % 2) * 2, bits(code, column) >> 16);
      }
  }
  static std::uint16_t bits16(const void* p) {
    std::uint16_t h;
    __builtin_memcpy(&h, p, 2);
    return h;
  }
  static void put16(void* p, std::uint32_t bits) {
    const std::uint16_t h = static_cast<std::uint16_t>(bits);
    __builtin_memcpy(p, &h, 2);
  }
};
