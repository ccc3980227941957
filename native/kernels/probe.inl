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

// Multiply-adds on registers alone, `chains` independent of each other. Returns the flops.
template <class V, class Op>
double arithmetic_chains(std::size_t rounds, V one, double flops_each, Op op) {
  constexpr int chains = 12;
  vec::f32 acc[chains];
  KT_UNROLLED (i, chains) {
    acc[i] = vec::zero();
    asm volatile("" : "+x"(acc[i]));  // or the compiler would merge equal chains
  }
  for (std::size_t r = 0; r < rounds; ++r) {
    asm volatile("" : "+x"(one));
    KT_UNROLLED (i, chains) acc[i] = op(acc[i], one);
  }
  KT_UNROLLED (i, chains) asm volatile("" : : "x"(acc[i]));
  return static_cast<double>(rounds) * chains * flops_each;
}
