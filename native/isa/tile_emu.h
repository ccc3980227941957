// The AMX tiles of a thread in plain C++: what the instructions do by the Intel SDM, volume 2. Where the hardware
// raises an exception, in any build, the process says why and aborts.
//
// The arithmetic does not depend on the mode of the floating-point unit, but for rounding to nearest. Wants <cstdio>
// and <cstdlib>.
#include "tile_config.h"

[[noreturn, gnu::cold, gnu::noinline]] inline void tile_fault(const char* instruction, const char* why) {
  std::fprintf(stderr, "tiles: %s: %s\n", instruction, why);
  std::abort();
}

class tiles {
 public:
  static void load_config(const tile_config& config) {
    check_config(config);
    file.config = config.palette == 0 ? unconfigured : config;
    __builtin_memset(file.data, 0, sizeof file.data);
  }

  template <int t>
  static void zero() {
    check_tile<t>("tilezero");
    __builtin_memset(file.data[t], 0, sizeof file.data[t]);
  }

  template <int t>
  static void load(const void* base, std::size_t stride) {
    check_tile<t>("tileloadd");
    zero<t>();
    for (std::size_t r = 0; r < rows(t); ++r)
      __builtin_memcpy(file.data[t][r], static_cast<const char*>(base) + r * stride, row_bytes(t));
  }

  template <int t>
  static void store(void* base, std::size_t stride) {
    check_tile<t>("tilestored");
    for (std::size_t r = 0; r < rows(t); ++r)
      __builtin_memcpy(static_cast<char*>(base) + r * stride, file.data[t][r], row_bytes(t));
  }

  template <int c, int a, int b>
  static void dpbf16() {
    check_product<c, a, b>("tdpbf16ps");
    add_bf16_products(c, a, b);
  }

  template <int c, int a, int b>
  static void dpbusd() {
    check_product<c, a, b>("tdpbusd");
    add_byte_products(c, a, b);
  }

  static void release() { file.config = unconfigured; }

 private:
  static constexpr int count = 8, max_rows = 16, max_row_bytes = 64, lanes = max_row_bytes / 4;
  static constexpr std::uint32_t sign_bit = 0x80000000u, smallest_normal = 0x00800000u;

  // As in hardware one per thread, and no tiles before the first configuration.
  static constexpr tile_config unconfigured{.palette = 0};
  struct registers {
    tile_config config;
    alignas(64) unsigned char data[count][max_rows][max_row_bytes];
  };
  static inline thread_local constinit registers file{unconfigured, {}};

  static std::size_t rows(int t) { return file.config.rows[t]; }
  static std::size_t row_bytes(int t) { return file.config.colsb[t]; }
  static std::uint32_t lane(int t, std::size_t row, std::size_t n) {
    std::uint32_t u;
    __builtin_memcpy(&u, file.data[t][row] + 4 * n, 4);
    return u;
  }

  static void check(bool right, const char* instruction, const char* why) {
    if (!right) [[unlikely]]
      tile_fault(instruction, why);
  }

  static void check_config(const tile_config& c) {
    constexpr const char* name = "ldtilecfg";
    check(c.palette <= 1, name, "#GP: no such palette");
    if (c.palette == 0) return;
    // Legal, and of no use but to the restart of an interrupted instruction.
    check(c.start_row == 0, name, "a start row");
    unsigned reserved = 0;
    for (std::uint8_t byte : c.reserved) reserved |= byte;
    for (int t = count; t < 16; ++t) reserved |= c.colsb[t] | c.rows[t];
    check(reserved == 0, name, "#GP: a reserved byte is not zero");
    for (int t = 0; t < count; ++t) {
      check(c.rows[t] <= max_rows, name, "#GP: more than 16 rows");
      check(c.colsb[t] <= max_row_bytes, name, "#GP: rows of more than 64 bytes");
      check((c.rows[t] == 0) == (c.colsb[t] == 0), name, "#GP: rows without columns, or columns without rows");
    }
  }

  template <int t>
  static void check_tile(const char* name) {
    static_assert(0 <= t && t < count);
    check(file.config.palette != 0, name, "#UD: the tiles are not configured");
    check(rows(t) != 0, name, "#UD: the tile is not configured");
    check(row_bytes(t) % 4 == 0, name, "#UD: the bytes of a row are no multiple of 4");
  }

  template <int c, int a, int b>
  static void check_product(const char* name) {
    static_assert(c != a && a != b && b != c, "#UD: the same tile twice");
    check_tile<c>(name);
    check_tile<a>(name);
    check_tile<b>(name);
    check(rows(c) == rows(a), name, "#UD: rows of the sum and of the left factor differ");
    check(row_bytes(c) == row_bytes(b), name, "#UD: columns of the sum and of the right factor differ");
    check(row_bytes(a) / 4 == rows(b), name, "#UD: columns of the left factor and rows of the right one differ");
  }

  // TDPBF16PS. Per element of c two sums over the pairs of k, ascending, of the even and of the odd products, each
  // from zero by fused multiply-adds; then c += even + odd. Denormals are zero wherever they go in or come out.
  [[gnu::noinline]] static void add_bf16_products(int c, int a, int b) {
    float even_b[max_rows][lanes], odd_b[max_rows][lanes];
    for (std::size_t k = 0; k < rows(b); ++k)
      for (int n = 0; n < lanes; ++n) {
        even_b[k][n] = even_of(lane(b, k, n));
        odd_b[k][n] = odd_of(lane(b, k, n));
      }
    for (std::size_t m = 0; m < rows(c); ++m) {
      float even[lanes] = {}, odd[lanes] = {}, sum[lanes];
      for (std::size_t k = 0; k < rows(b); ++k) {
        multiply_add(even, even_of(lane(a, m, k)), even_b[k]);
        multiply_add(odd, odd_of(lane(a, m, k)), odd_b[k]);
      }
      // The sum of two floats is exact where it is tiny: it can be rounded first, and flushed then.
      for (int n = 0; n < lanes; ++n) {
        const float products = flushed(even[n] + odd[n]);
        sum[n] = flushed(flushed(as_f32(lane(c, m, n))) + products);
      }
      __builtin_memcpy(file.data[c][m], sum, row_bytes(c));
    }
  }

  // TDPBUSD. c += a * b modulo 2^32; bytes of a are unsigned, of b signed.
  [[gnu::noinline]] static void add_byte_products(int c, int a, int b) {
    std::int32_t bytes_b[max_rows][4][lanes];
    for (std::size_t k = 0; k < rows(b); ++k)
      for (int q = 0; q < 4; ++q)
        for (int n = 0; n < lanes; ++n) bytes_b[k][q][n] = static_cast<std::int8_t>(lane(b, k, n) >> 8 * q);
    for (std::size_t m = 0; m < rows(c); ++m) {
      std::uint32_t sum[lanes];
      __builtin_memcpy(sum, file.data[c][m], sizeof sum);
      for (std::size_t k = 0; k < rows(b); ++k)
        for (int q = 0; q < 4; ++q) {
          const std::int32_t byte_a = file.data[a][m][4 * k + q];
          for (int n = 0; n < lanes; ++n) sum[n] += static_cast<std::uint32_t>(byte_a * bytes_b[k][q][n]);
        }
      __builtin_memcpy(file.data[c][m], sum, row_bytes(c));
    }
  }

  static std::uint32_t magnitude(float x) { return as_u32(x) & ~sign_bit; }
  static float flushed(float x) { return as_f32(as_u32(x) & (magnitude(x) < smallest_normal ? sign_bit : ~0u)); }
  static float even_of(std::uint32_t pair) { return flushed(as_f32(pair << 16)); }
  static float odd_of(std::uint32_t pair) { return flushed(as_f32(pair & 0xffff0000u)); }

  // sum += a * b, with one rounding. A result counts as denormal if it is one when rounded to 24 bits without a limit
  // to the exponent ("tininess after rounding"); fma alone would round some of these up to the smallest normal number.
  // Not inlined, or the loops are unrolled before they are made vectors.
  [[gnu::noinline]] static void multiply_add(float (&sum)[lanes], float a, const float (&b)[lanes]) {
    float rounded[lanes];
    std::uint32_t edge = 0;
    for (int n = 0; n < lanes; ++n) {
      rounded[n] = __builtin_fmaf(a, b[n], sum[n]);
      edge |= magnitude(rounded[n]) == smallest_normal;
    }
    if (edge) [[unlikely]]
      for (int n = 0; n < lanes; ++n)
        if (magnitude(rounded[n]) == smallest_normal && is_tiny(a, b[n], sum[n])) rounded[n] *= 0.0f;
    for (int n = 0; n < lanes; ++n) sum[n] = flushed(rounded[n]);
  }

  // Half way between the smallest normal number and the one of 24 bits below it, and higher, rounds to the former.
  // The product, of 16 bits, is exact in double. So is the sum unless a product below 2^-166 is added to the smallest
  // normal number, and then it is far from half way; rounding is monotonic.
  static bool is_tiny(float a, float b, float sum) {
    const double exact = static_cast<double>(a) * b + sum;
    return (exact < 0 ? -exact : exact) < 0x1p-126 - 0x1p-151;
  }
};
