// Transposes as many vectors as a vector has lanes by shuffles of whole vectors, for which compilers know the
// instructions. Included after `vec`.

class shuffles {
 public:
  typedef std::int32_t index __attribute__((vector_size(4 * vec::lanes)));

  // Of each four lanes of both, lanes `from` and `from` + 1: in turns; those of the first before those of the second.
  static constexpr index unpack(int from) {
    return indices([from](int i) { return i / 4 * 4 + from + i % 4 / 2 + i % 2 * vec::lanes; });
  }
  static constexpr index pairs(int from) {
    return indices([from](int i) { return i / 4 * 4 + from + i % 2 + i % 4 / 2 * vec::lanes; });
  }
  // The lower or the upper half of both.
  static constexpr index halves(int upper) {
    return indices([upper](int i) { return i % half + upper * half + i / half * vec::lanes; });
  }
  // The blocks of four lanes of both that are even, or odd.
  static constexpr index alternate(int odd) {
    return indices([odd](int i) { return (i / 4 * 2 + odd) * 4 % vec::lanes + i % 4 + i / half * vec::lanes; });
  }
  // Of the first, lanes that are `distance` apart, a power of two, change places.
  static constexpr index exchange(int distance) {
    return indices([distance](int i) { return i ^ distance; });
  }
  // Of both, one after the other, the lanes that are even, or odd.
  static constexpr index every_second(int odd) {
    return indices([odd](int i) { return 2 * i + odd; });
  }

 private:
  static constexpr int half = vec::lanes > 1 ? vec::lanes / 2 : 1;
  template <class F>
  static constexpr index indices(F f) {
    std::int32_t lanes[vec::lanes] = {};
    for (int i = 0; i < vec::lanes; ++i) lanes[i] = f(i);
    return __builtin_bit_cast(index, lanes);
  }
};

// x[i][j] becomes x[j][i].
template <class V>
[[gnu::always_inline]] inline void transpose(V (&x)[vec::lanes]) {
  constexpr int lanes = sizeof(V) / 4;
  if constexpr (lanes > 1) {
    V y[lanes];
    KT_UNROLLED (i, lanes / 4) {
      const V* four = x + 4 * i;
      const V low01 = __builtin_shuffle(four[0], four[1], shuffles::unpack(0));
      const V low23 = __builtin_shuffle(four[2], four[3], shuffles::unpack(0));
      const V high01 = __builtin_shuffle(four[0], four[1], shuffles::unpack(2));
      const V high23 = __builtin_shuffle(four[2], four[3], shuffles::unpack(2));
      y[4 * i] = __builtin_shuffle(low01, low23, shuffles::pairs(0));
      y[4 * i + 1] = __builtin_shuffle(low01, low23, shuffles::pairs(2));
      y[4 * i + 2] = __builtin_shuffle(high01, high23, shuffles::pairs(0));
      y[4 * i + 3] = __builtin_shuffle(high01, high23, shuffles::pairs(2));
    }
    // Block b of four lanes of y[4 i + r] is column 4 b + r of the rows from 4 i on.
    KT_UNROLLED (r, 4) {
      if constexpr (lanes == 8) {
        x[r] = __builtin_shuffle(y[r], y[4 + r], shuffles::halves(0));
        x[4 + r] = __builtin_shuffle(y[r], y[4 + r], shuffles::halves(1));
      } else {
        static_assert(lanes == 16);
        const V even01 = __builtin_shuffle(y[r], y[4 + r], shuffles::alternate(0));
        const V even23 = __builtin_shuffle(y[8 + r], y[12 + r], shuffles::alternate(0));
        const V odd01 = __builtin_shuffle(y[r], y[4 + r], shuffles::alternate(1));
        const V odd23 = __builtin_shuffle(y[8 + r], y[12 + r], shuffles::alternate(1));
        x[r] = __builtin_shuffle(even01, even23, shuffles::alternate(0));
        x[8 + r] = __builtin_shuffle(even01, even23, shuffles::alternate(1));
        x[4 + r] = __builtin_shuffle(odd01, odd23, shuffles::alternate(0));
        x[12 + r] = __builtin_shuffle(odd01, odd23, shuffles::alternate(1));
      }
    }
  }
}
