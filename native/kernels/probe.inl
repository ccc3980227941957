// What this machine can do with this instruction set: the two ceilings of the roofline.

std::uint64_t read_bytes(const void* begin, std::size_t bytes) {
  typedef std::uint64_t wide __attribute__((vector_size(vec::lanes < 4 ? 16 : vec::lanes * 4), aligned(1), may_alias));
  const auto* p = static_cast<const wide*>(begin);
  wide x0{}, x1{}, x2{}, x3{};
  for (std::size_t n = bytes / (4 * sizeof(wide)); n; --n, p += 4) {
    x0 ^= p[0];
    x1 ^= p[1];
    x2 ^= p[2];
    x3 ^= p[3];
  }
  x0 ^= x1 ^ x2 ^ x3;
  std::uint64_t sum = 0;
  for (unsigned i = 0; i < sizeof(wide) / 8; ++i) sum ^= x0[i];
  return sum;
}

template <class V>
inline void opaque(V& x) {
  if constexpr (std::is_integral_v<V>)
    asm volatile("" : "+r"(x));
  else
    asm volatile("" : "+x"(x));
}

// Multiply-adds on registers alone, `chains` independent of each other. Returns the operations.
template <class V, class A, class Op>
double arithmetic_chains(std::size_t rounds, V one, A start, double each, Op op) {
  constexpr int chains = 12;
  A acc[chains];
  KT_UNROLLED (i, chains) {
    acc[i] = start;
    opaque(acc[i]);  // or the compiler would merge equal chains
  }
  for (std::size_t r = 0; r < rounds; ++r) {
    opaque(one);
    KT_UNROLLED (i, chains) acc[i] = op(acc[i], one);
  }
  KT_UNROLLED (i, chains) opaque(acc[i]);
  return static_cast<double>(rounds) * chains * each;
}
