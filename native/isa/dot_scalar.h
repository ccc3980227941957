// Four products of int8 codes added to one 32-bit sum; those of rows are stored as code + 128.
struct dot {
  using i32 = std::int32_t;
  using weights = std::uint32_t;
  static constexpr bool unsigned_rows = true;
  static constexpr int tile_vectors(int) { return 4; }

  static i32 zero() { return 0; }
  static i32 load(const void* p) { return load_as<std::int32_t>(p); }
  static void store(void* p, i32 x) { __builtin_memcpy(p, &x, 4); }
  static i32 set1(std::uint32_t four) { return static_cast<i32>(four); }
  static weights prepare(const char* p) { return load_as<std::uint32_t>(p); }
  static weights prepare(i32 x) { return static_cast<weights>(x); }
  static i32 add(i32 acc, i32 x, weights w) {
    auto sum = static_cast<std::uint32_t>(acc);  // sums may pass 2^31 until `sub`
    for (int shift = 0; shift < 32; shift += 8)
      sum += static_cast<unsigned char>(static_cast<std::uint32_t>(x) >> shift) * static_cast<signed char>(w >> shift);
    return static_cast<i32>(sum);
  }
  static i32 sub(i32 a, i32 b) {
    return static_cast<i32>(static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(b));
  }
  static vec::f32 to_float(i32 x) { return static_cast<float>(x); }
  static i32 add(i32 a, i32 b) { return a + b; }

  // Products of codes of four bits, 0 to 15 less a zero point, with signed ones. `sums` holds those of 32 k. A row
  // brings the sums of its codes of even and of odd k, negative, times which the zero points are added at first.
  static constexpr int int4_loads(int) { return 1; }
  static constexpr int int4_rows = 4;
  static weights low_codes(const char* p) { return prepare(p) & 0x0f0f0f0fu; }
  static weights high_codes(const char* p) { return prepare(p) >> 4 & 0x0f0f0f0fu; }
  using sums = std::int32_t;
  static sums add_int4(sums acc, i32 x, weights codes) {
    for (int shift = 0; shift < 32; shift += 8)
      acc += static_cast<signed char>(static_cast<std::uint32_t>(x) >> shift) * static_cast<int>(codes >> shift & 255u);
    return acc;
  }
  static i32 total(sums acc) { return acc; }
  static constexpr bool sums_last = true;
  static std::uint32_t int4_sum(int even, int odd) { return static_cast<std::uint32_t>(-even - odd); }
  static sums int4_start(i32 row) { return 8 * row; }
  static sums int4_start(i32 row, const char* zero) { return row * *zero; }
};
