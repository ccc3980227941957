// Tests of the emulated tiles and of the kernels on tiles, emulated and in hardware: tile_tests [--quick]
//
// Without AMX the hardware kernels run too: each tile instruction raises SIGILL, and the handler does what the emulator
// does. So what is tested is the machine code: encodings, order of operands, and that memory holds what it should.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <ucontext.h>
#include <xmmintrin.h>
#endif

#define KT_ISA_NAME emulated
#include "../isa/begin.inl"
#include "../isa/tile_emu.h"
#include "../kernels/gemm_amx.inl"
}
}
}

// tiles_hw.cpp
extern "C" void hw_gemm_bf16(const void* job);
extern "C" void hw_gemm_int8(const void* job);
extern "C" std::uint32_t hw_round_trip(std::uint32_t seed);

namespace {

using kt::emulated::tile_config;
using kt::emulated::tile_gemm;
using kt::emulated::tile_gemm_bf16;
using kt::emulated::tile_gemm_int8;
using kt::emulated::tiles;

bool quick = false;
int checks = 0;

void check(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

std::mt19937 random_bits(1);
int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

float to_float(std::uint32_t u) { return __builtin_bit_cast(float, u); }
std::uint32_t to_bits(float x) { return __builtin_bit_cast(std::uint32_t, x); }

// What the floating-point unit does with denormals. Nothing may depend on it.
struct denormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  explicit denormals(bool are_zero) { _mm_setcsr(are_zero ? saved | 0x8040u : saved & ~0x8040u); }
  ~denormals() { _mm_setcsr(saved); }
#else
  explicit denormals(bool) {}
#endif
};

float zero_if_denormal(float x) { return (to_bits(x) & 0x7f800000u) == 0 ? to_float(to_bits(x) & 0x80000000u) : x; }

// a * b + c for bf16 a and b, rounded once; zero if denormal after rounding to 24 bits. The product is exact in double.
// Their sum is rounded to odd, inexact results to the neighbour with an odd last bit, which a second rounding to two
// bits less or fewer cannot tell from the exact sum.
float fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * b;
  double sum = product + c;
  const double c_kept = sum - product, error = (product - (sum - c_kept)) + (c - c_kept);
  if (std::isfinite(sum) && error != 0 && __builtin_bit_cast(std::uint64_t, sum) % 2 == 0)
    sum = std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
  if (std::fabs(sum) < 0x1p-100 && std::fabs(static_cast<float>(sum * 0x1p64)) < 0x1p-62f)
    return std::signbit(sum) ? -0.0f : 0.0f;
  return static_cast<float>(sum);
}

// Bytes between guards, which show if anything outside was written. Under the address sanitizer, reading is found too.
class guarded {
 public:
  explicit guarded(std::size_t bytes) : all_(guard + bytes + guard, 0xc3) {}
  char* begin() { return reinterpret_cast<char*>(all_.data() + guard); }
  std::size_t bytes() const { return all_.size() - 2 * guard; }
  void fill(std::uint8_t byte) { std::memset(begin(), byte, bytes()); }
  bool whole() const {
    const auto untouched = [](std::uint8_t b) { return b == 0xc3; };
    return std::all_of(all_.begin(), all_.begin() + guard, untouched) &&
           std::all_of(all_.end() - guard, all_.end(), untouched);
  }

 private:
  static constexpr std::ptrdiff_t guard = 256;
  std::vector<std::uint8_t> all_;
};

// Numbers that meet each other: mostly of moderate size, but also zeros, denormals, infinities, NaN, extremes.
std::uint16_t any_bf16(bool special) {
  if (special && below(8) == 0) {
    constexpr std::uint16_t values[] = {0,      0x8000, 1,      0x807f, 0x0080, 0x8080, 0x7f80,
                                        0xff80, 0x7fc0, 0x7f81, 0x7f7f, 0xff7f, 0x1a00, 0x9a00};
    return values[below(std::size(values))];
  }
  const int exponent = special && below(4) == 0 ? below(256) : 120 + below(12);
  return static_cast<std::uint16_t>(below(2) << 15 | exponent << 7 | below(128));
}

enum class kind { bf16, int8 };

struct problem {
  kind type;
  int rows;
  std::size_t k;
  std::vector<std::uint16_t> a16, w16;  // [rows][k], [k][32]
  std::vector<std::uint8_t> a8;
  std::vector<std::int8_t> w8;

  std::size_t unit() const { return type == kind::bf16 ? 32 : 64; }
  std::size_t element() const { return type == kind::bf16 ? 2 : 1; }
  std::string name() const {
    return std::string(type == kind::bf16 ? "bf16" : "int8") + " rows " + std::to_string(rows) + " k " +
           std::to_string(k);
  }

  problem(kind t, int r, std::size_t units, bool special) : type(t), rows(r), k(units * unit()) {
    for (std::size_t i = 0; i < rows * k; ++i) {
      a16.push_back(any_bf16(special));
      a8.push_back(static_cast<std::uint8_t>(special ? 255 * below(2) : below(256)));
    }
    for (std::size_t i = 0; i < k * 32; ++i) {
      w16.push_back(any_bf16(special));
      w8.push_back(static_cast<std::int8_t>(special ? 127 - 255 * below(2) : below(256) - 128));
    }
  }

  // The definition: gemm_amx.inl.
  std::vector<std::uint32_t> product() const {
    std::vector<std::uint32_t> c(rows * 32);
    for (int m = 0; m < rows; ++m)
      for (int n = 0; n < 32; ++n) c[m * 32 + n] = type == kind::bf16 ? to_bits(sum_bf16(m, n)) : sum_int8(m, n);
    return c;
  }

  float sum_bf16(int m, int n) const {
    const auto value = [](std::uint16_t h) { return zero_if_denormal(to_float(std::uint32_t{h} << 16)); };
    float c = 0;
    for (std::size_t block = 0; block < k; block += 32) {
      float sums[2] = {};
      for (std::size_t i = block; i < block + 32; ++i)
        sums[i % 2] = fused(value(a16[m * k + i]), value(w16[i * 32 + n]), sums[i % 2]);
      c = zero_if_denormal(c + zero_if_denormal(sums[0] + sums[1]));
    }
    return c;
  }

  std::uint32_t sum_int8(int m, int n) const {
    std::uint32_t c = 0;
    for (std::size_t i = 0; i < k; ++i) c += static_cast<std::uint32_t>(a8[m * k + i] * w8[i * 32 + n]);
    return c;
  }

  // [k / U][rows of the tile][U] for each tile of rows
  void pack_rows(char* packed) const {
    const int count = (rows + 15) / 16;
    for (int t = 0, begin = 0, end; t < count; ++t, begin = end) {
      end = begin + rows / count + (t < rows % count);
      for (std::size_t block = 0; block < k; block += unit())
        for (int m = begin; m < end; ++m, packed += 64)
          std::memcpy(packed, type == kind::bf16 ? static_cast<const void*>(&a16[m * k + block]) : &a8[m * k + block],
                      64);
    }
  }

  // [k / 2][32][2] or [k / 4][32][4]
  void pack_weights(char* packed) const {
    const std::size_t group = 4 / element();
    for (std::size_t i = 0; i < k; i += group)
      for (int n = 0; n < 32; ++n)
        for (std::size_t j = i; j < i + group; ++j, packed += element())
          std::memcpy(packed, type == kind::bf16 ? static_cast<const void*>(&w16[j * 32 + n]) : &w8[j * 32 + n],
                      element());
  }
};

using kernel = std::function<void(const tile_gemm&)>;

bool same(const std::uint32_t* got, const std::uint32_t* right, std::size_t n, kind type) {
  const auto nan = [&](std::uint32_t u) { return type == kind::bf16 && std::isnan(to_float(u)); };
  return std::equal(got, got + n, right, [&](auto x, auto y) { return x == y || (nan(x) && nan(y)); });
}

// Computes `p` with k cut at `cuts` (multiples of U; ascending) and compares with the definition.
void test_product(const problem& p, std::vector<std::size_t> cuts, const kernel& run) {
  guarded rows(p.rows * p.k * p.element()), c(p.rows * 128 + 1);
  p.pack_rows(rows.begin());
  std::vector<char> weights(p.k * 32 * p.element());
  p.pack_weights(weights.data());
  // NaN, and not aligned
  c.fill(0xff);
  std::vector<std::uint32_t> got(p.rows * 32);
  cuts.push_back(p.k);
  for (std::size_t i = 0, from = 0; i < cuts.size(); from = cuts[i++]) {
    guarded w((cuts[i] - from) * 32 * p.element());
    std::memcpy(w.begin(), weights.data() + from * 32 * p.element(), w.bytes());
    run({w.begin(), rows.begin(), p.rows, p.k, from, cuts[i], c.begin() + 1, i == 0, below(2) ? w.begin() : nullptr,
         w.bytes()});
    check(w.whole(), p.name() + ": guards of the weights");
  }
  check(rows.whole() && c.whole() && c.begin()[0] == '\xff', p.name() + ": guards");
  std::memcpy(got.data(), c.begin() + 1, got.size() * 4);
  check(same(got.data(), p.product().data(), got.size(), p.type),
        p.name() + ", " + std::to_string(cuts.size()) + " cuts");
}

void test_products(const kernel& bf16, const kernel& int8, int rows) {
  for (bool special : {false, true})
    for (kind type : {kind::bf16, kind::int8}) {
      const problem p(type, rows, 1 + below(5), special);
      std::vector<std::size_t> cuts;
      for (std::size_t at = p.unit(); at < p.k; at += p.unit())
        if (below(2)) cuts.push_back(at);
      const kernel& run = type == kind::bf16 ? bf16 : int8;
      const denormals mode(below(2));
      test_product(p, {}, run);
      test_product(p, cuts, run);
    }
}

void test_kernels() {
  for (int rows = 1; rows <= 70; rows += quick ? 1 + below(16) : 1)
    test_products([](const tile_gemm& job) { tile_gemm_bf16(job); }, [](const tile_gemm& job) { tile_gemm_int8(job); },
                  rows);
}

// Other numbers of rows from call to call, many of them close, so that there is something to configure anew or not.
void test_one_session() {
  kt::emulated::tile_session session;
  for (int i = 0; i < (quick ? 5 : 50); ++i)
    test_products([&](const tile_gemm& job) { tile_gemm_bf16(session, job); },
                  [&](const tile_gemm& job) { tile_gemm_int8(session, job); },
                  below(2) ? 23 + below(4) : 1 + below(70));
}

void test_nothing_to_do() {
  float c[32];
  std::fill_n(c, 32, NAN);
  tile_gemm_bf16({nullptr, nullptr, 0, 64, 0, 64, nullptr, true});
  tile_gemm_bf16({nullptr, nullptr, 1, 64, 32, 32, c, true});
  check(std::count(c, c + 32, 0.0f) == 32, "an empty sum is zero");
}

// c = c + (first * 1 + a * b + odd * 1), where it is easy to round wrongly.
struct edge {
  std::uint16_t first, a, b, odd;
  std::uint32_t c, right;
  const char* what;
};

constexpr edge edges[] = {
    {0x0080, 0x1a00, 0x9a00, 0, 0, 0, "2^-126 - 2^-150 is tiny after rounding"},
    {0x0080, 0x1a00, 0x9980, 0, 0, 0x00800000, "2^-126 - 2^-151 is a tie, which is rounded up"},
    {0x0080, 0x1a01, 0x9980, 0, 0, 0, "a little less than the tie"},
    {0x8080, 0x1a00, 0x1980, 0, 0, 0x80800000, "the tie, negative"},
    {0x8080, 0x1a00, 0x1a00, 0, 0, 0, "tiny and negative: - 0, and + 0 with the sum of the odd products"},
    {0x0080, 0x0080, 0x8080, 0, 0, 0x00800000, "2^-126 - 2^-252"},
    {0x0000, 0x0080, 0x8080, 0x8080, 0x80000000, 0x80800000, "- 2^-252, which is - 0, and - 2^-126"},
    {0x0000, 0x007f, 0x7f7f, 0, 0, 0, "a denormal factor"},
    {0x00c0, 0, 0, 0x8080, 0x00800000, 0x00800000, "even + odd is denormal"},
    {0x0080, 0, 0, 0, 0x007fffff, 0x00800000, "c is denormal"},
    {0x00c0, 0, 0, 0, 0x80800000, 0, "the new c is denormal"},
    {0x3f80, 0x3f80, 0x3380, 0, 0, 0x3f800000, "1 + 2^-24 is a tie"},
    {0x3f80, 0x3f80, 0x3381, 0, 0, 0x3f800001, "a little more than the tie"},
    {0x4b80, 0x3f80, 0x3f80, 0, 0xcb800000, 0, "products are summed before c is added"},
    {0x4b80, 0xcb80, 0x3f80, 0x3f80, 0, 0x3f800000, "odd products are summed apart"},
    {0x7f7f, 0x7f00, 0x4000, 0, 0, 0x7f800000, "overflow"},
    {0x7f80, 0x3f80, 0xff80, 0, 0, 0x7fc00000, "infinity - infinity"},
    {0x3f80, 0x0000, 0x7f80, 0, 0, 0x7fc00000, "0 * infinity"},
    {0x3f80, 0x007f, 0x7f80, 0, 0, 0x7fc00000, "a denormal * infinity"},
};

void test_edges() {
  tile_config config;
  const int rows[] = {1, 1, 2}, bytes[] = {4, 8, 4};
  for (int t = 0; t < 3; ++t) {
    config.rows[t] = static_cast<std::uint8_t>(rows[t]);
    config.colsb[t] = static_cast<std::uint16_t>(bytes[t]);
  }
  for (const edge& e : edges)
    for (bool are_zero : {false, true}) {
      const std::uint16_t a[] = {e.first, e.odd, e.a, 0}, b[2][2] = {{0x3f80, 0x3f80}, {e.b, 0}};
      std::uint32_t c = e.c;
      const denormals mode(are_zero);
      tiles::load_config(config);
      tiles::load<0>(&c, 4);
      tiles::load<1>(a, 8);
      tiles::load<2>(b, 4);
      tiles::dpbf16<0, 1, 2>();
      tiles::store<0>(&c, 4);
      tiles::release();
      check(same(&c, &e.right, 1, kind::bf16), e.what);
    }
}

// `fault` must end the process with a message that has `words`.
void check_fault(const char* words, const std::function<void()>& fault) {
  int ends[2];
  check(pipe(ends) == 0, "pipe");
  std::fflush(stdout);
  const pid_t child = fork();
  check(child >= 0, "fork");
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    fault();
    _exit(0);
  }
  close(ends[1]);
  char message[4096] = {};
  ssize_t n = 0;
  for (ssize_t got; (got = read(ends[0], message + n, sizeof message - 1 - n)) > 0;) n += got;
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  check(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && std::strstr(message, words),
        std::string("no \"") + words + "\" but \"" + message + '"');
}

// Sums of 3 x 5 by 4 pairs or quads: every extent of its own, so that each disagreement is found.
tile_config small_config() {
  tile_config c;
  c.rows[0] = c.rows[1] = 3;
  c.rows[2] = 4;
  c.colsb[0] = c.colsb[2] = 20;
  c.colsb[1] = 16;
  return c;
}

void check_config_fault(const char* words, const std::function<void(tile_config&)>& spoil) {
  check_fault(words, [&] {
    tile_config c = small_config();
    spoil(c);
    tiles::load_config(c);
  });
}

void check_product_fault(const char* words, const std::function<void(tile_config&)>& spoil) {
  for (bool bytes : {false, true})
    check_fault(words, [&] {
      tile_config c = small_config();
      spoil(c);
      tiles::load_config(c);
      bytes ? tiles::dpbusd<0, 1, 2>() : tiles::dpbf16<0, 1, 2>();
    });
}

void test_faults() {
  const auto reserved_byte = [](int i) { return [i](tile_config& c) { reinterpret_cast<std::uint8_t*>(&c)[i] = 1; }; };
  check_config_fault("no such palette", [](tile_config& c) { c.palette = 2; });
  check_config_fault("start row", [](tile_config& c) { c.start_row = 1; });
  for (int i : {2, 15, 32, 47, 56, 63}) check_config_fault("reserved", reserved_byte(i));
  check_config_fault("more than 16 rows", [](tile_config& c) { c.rows[1] = 17; });
  check_config_fault("more than 64 bytes", [](tile_config& c) { c.colsb[1] = 68; });
  check_config_fault("without", [](tile_config& c) { c.rows[7] = 1; });
  check_config_fault("without", [](tile_config& c) { c.colsb[7] = 4; });

  char memory[64 * 16] = {};
  const std::pair<const char*, std::function<void()>> uses[] = {
      {"tilezero", [] { tiles::zero<0>(); }},
      {"tileloadd", [&] { tiles::load<0>(memory, 64); }},
      {"tilestored", [&] { tiles::store<0>(memory, 64); }},
  };
  for (const auto& [name, use] : uses) {
    check_fault(name, use);
    check_fault("tiles are not configured", use);
    check_fault("tiles are not configured", [&] {
      tiles::load_config(small_config());
      tiles::release();
      use();
    });
    check_fault("tiles are not configured", [&] {
      tiles::load_config(small_config());
      tiles::load_config({.palette = 0});
      use();
    });
    check_fault("tile is not configured", [&] {
      tile_config c = small_config();
      c.rows[0] = 0;
      c.colsb[0] = 0;
      tiles::load_config(c);
      use();
    });
    check_fault("multiple of 4", [&] {
      tile_config c = small_config();
      c.colsb[0] = 18;
      tiles::load_config(c);
      use();
    });
  }
  check_product_fault("tiles are not configured", [](tile_config& c) { c = {.palette = 0}; });
  check_product_fault("tile is not configured", [](tile_config& c) { c.rows[1] = 0, c.colsb[1] = 0; });
  check_product_fault("multiple of 4", [](tile_config& c) { c.colsb[1] = 18; });
  check_product_fault("rows of the sum", [](tile_config& c) { c.rows[0] = 2; });
  check_product_fault("columns of the sum", [](tile_config& c) { c.colsb[0] = 16; });
  check_product_fault("columns of the left factor", [](tile_config& c) { c.rows[2] = 5; });
  check_fault("tiles are not configured", [&] {  // a kernel releases its tiles
    tile_gemm_bf16({memory, memory, 1, 0, 0, 0, memory, true});
    tiles::zero<0>();
  });
}

#if defined(__x86_64__)

// run<t>() for t == n
template <class F, int... t>
void with_tile(int n, F&& run, std::integer_sequence<int, t...>) {
  ((t == n ? run.template operator()<t>() : void()), ...);
}
template <class F>
void with_tile(int n, F&& run) {
  with_tile(n, run, std::make_integer_sequence<int, 8>());
}

// The kernels use these triples and no other.
template <class F>
void with_product(int c, int a, int b, F&& run) {
  if (c == 0 && a == 4 && b == 6) return run.template operator()<0, 4, 6>();
  if (c == 1 && a == 4 && b == 7) return run.template operator()<1, 4, 7>();
  if (c == 2 && a == 5 && b == 6) return run.template operator()<2, 5, 6>();
  if (c == 3 && a == 5 && b == 7) return run.template operator()<3, 5, 7>();
  kt::emulated::tile_fault("trap", "no such product in the kernels");
}

int trapped = 0;

// Address of a memory operand; a displacement is 0, 8 or 32 bits. Moves `code` past it.
char* address_of(const std::uint8_t*& code, const greg_t* registers, std::uint8_t vex1, std::size_t* stride) {
  constexpr int numbers[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const std::uint8_t modrm = *code++;
  const int mod = modrm >> 6, base_extension = vex1 & 0x20 ? 0 : 8, index_extension = vex1 & 0x40 ? 0 : 8;
  int base = (modrm & 7) | base_extension;
  if ((modrm & 7) == 4) {
    const std::uint8_t sib = *code++;
    base = (sib & 7) | base_extension;
    const int index = (sib >> 3 & 7) | index_extension;
    *stride = index == 4 ? 0 : static_cast<std::size_t>(registers[numbers[index]]) << (sib >> 6);
  }
  std::int64_t displacement = 0;
  if (mod == 1) displacement = static_cast<std::int8_t>(*code++);
  if (mod == 2 || (mod == 0 && (base & 7) == 5)) {
    std::int32_t d;
    std::memcpy(&d, code, 4);
    displacement = d;
    code += 4;
    if (mod == 0) kt::emulated::tile_fault("trap", "an address without a base");
  }
  return reinterpret_cast<char*>(registers[numbers[base]] + displacement);
}

// VEX: c4, ~R~X~B and map 2, W ~vvvv L and prefix, opcode, ModRM.
void execute_tile_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]);
  const std::uint8_t vex1 = code[1], vex2 = code[2], opcode = code[3], modrm = code[4];
  const int prefix = vex2 & 3, vvvv = ~vex2 >> 3 & 15, reg = modrm >> 3 & 7, rm = modrm & 7;
  if (code[0] != 0xc4 || (vex1 & 0x1f) != 2 || (vex2 & 0x84) != 0)
    kt::emulated::tile_fault("trap", "no tile instruction");
  code += 4;
  std::size_t stride = 0;
  if (opcode == 0x49 && prefix == 0 && modrm == 0xc0) {
    tiles::release();
    ++code;
  } else if (opcode == 0x49 && prefix == 0) {
    tiles::load_config(*reinterpret_cast<const tile_config*>(address_of(code, registers, vex1, &stride)));
  } else if (opcode == 0x49 && prefix == 3) {
    with_tile(reg, []<int t> { tiles::zero<t>(); });
    ++code;
  } else if (opcode == 0x4b && prefix != 0) {
    char* base = address_of(code, registers, vex1, &stride);
    if (prefix == 2)
      with_tile(reg, [=]<int t> { tiles::store<t>(base, stride); });
    else
      with_tile(reg, [=]<int t> { tiles::load<t>(base, stride); });
  } else if (opcode == 0x5c && prefix == 2) {
    with_product(reg, rm, vvvv, []<int c, int a, int b> { tiles::dpbf16<c, a, b>(); });
    ++code;
  } else if (opcode == 0x5e && prefix == 1) {
    with_product(reg, rm, vvvv, []<int c, int a, int b> { tiles::dpbusd<c, a, b>(); });
    ++code;
  } else {
    kt::emulated::tile_fault("trap", "no such tile instruction");
  }
  ++trapped;
  registers[REG_RIP] = reinterpret_cast<greg_t>(code);
}

void test_hardware() {
  for (int rows = 1; rows <= 70; rows += quick ? 30 : 1)
    test_products([](const tile_gemm& job) { hw_gemm_bf16(&job); }, [](const tile_gemm& job) { hw_gemm_int8(&job); },
                  rows);
  for (std::uint32_t seed : {1u, 3u, 0x80000001u}) {
    std::uint32_t sum = 0;
    for (std::uint32_t i = 0; i < 32; ++i) sum += seed * (i % 16 < 8 ? i / 16 * 8 + i % 16 : 1) * (i + 1);
    check(hw_round_trip(seed) == sum, "memory to tile to memory");
  }
}

void test_trapped_hardware() {
  struct sigaction action = {}, before;
  action.sa_sigaction = execute_tile_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &before);
  test_hardware();
  sigaction(SIGILL, &before, nullptr);
  check(trapped > 100, "tile instructions were trapped");
}

#endif

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  if (argc > 1 + quick) return std::printf("usage: tile_tests [--quick]\n"), 2;
  test_edges();
  test_nothing_to_do();
  test_kernels();
  test_one_session();
  test_faults();
#if defined(__x86_64__)
  // ARCH_REQ_XCOMP_PERM for the tile data. Without it a processor with AMX traps all instructions but LDTILECFG.
  if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) {
    test_hardware();
    std::printf("tile_tests: the kernels ran in hardware\n");
  } else {
    test_trapped_hardware();
    std::printf("tile_tests: no AMX here; %d tile instructions trapped and emulated\n", trapped);
  }
#endif
  std::printf("tile_tests: %d checks\n", checks);
}
