// The AMX tiles of a thread. Needs an assembler that knows AMX, and no compiler flags.
//
// Assembly, since the intrinsics of GCC 12 do not tell the compiler what they read: it drops the stores that fill a
// tile configuration or the memory that a tile is loaded from. Here that memory is an operand, as an array of unknown
// length from `base` on, so that only accesses to it are kept in order and not, as with a "memory" clobber, all.
// tilestored is a read as well ("+m"): between the rows, and past the last one, memory keeps what it has.
#include "tile_config.h"

class tiles {
 public:
  static void load_config(const tile_config& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

  template <int t>
  static void zero() {
    static_assert(is_tile(t));
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }

  template <int t>
  static void load(const void* base, std::size_t stride) {
    static_assert(is_tile(t));
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(base), "r"(stride), "i"(t), "m"(*static_cast<const char (*)[]>(base)));
  }

  template <int t>
  static void store(void* base, std::size_t stride) {
    static_assert(is_tile(t));
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)"
                 : "+m"(*static_cast<char (*)[]>(base))
                 : "r"(base), "r"(stride), "i"(t));
  }

  // c += a * b; a: pairs of bf16 of a row, b: of a column
  template <int c, int a, int b>
  static void dpbf16() {
    static_assert(is_product(c, a, b), "#UD: no such tile, or the same tile twice");
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }

  // c += a * b; a: four unsigned bytes of a row, b: four signed bytes of a column
  template <int c, int a, int b>
  static void dpbusd() {
    static_assert(is_product(c, a, b), "#UD: no such tile, or the same tile twice");
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }

  static void release() { asm volatile("tilerelease"); }

 private:
  static constexpr bool is_tile(int t) { return 0 <= t && t < 8; }
  static constexpr bool is_product(int c, int a, int b) {
    return is_tile(c) && is_tile(a) && is_tile(b) && c != a && a != b && b != c;
  }
};
