// Elementary functions on `vec`, the same operations in the same order on every instruction set.

inline vec::f32 constant(float x) { return vec::set1(x); }

// c[0] + c[1] x + ... by Horner's rule
template <int N>
inline vec::f32 polynomial(vec::f32 x, const float (&c)[N]) {
  vec::f32 p = constant(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) p = vec::fma(p, x, constant(c[i]));
  return p;
}

// e^x of numbers in [-88, 89], whose last step times(p, n) is p 2^n.
template <class Times>
[[gnu::always_inline]] inline vec::f32 exp_by(vec::f32 x, Times times) {
  const vec::f32 n = vec::round(vec::mul(x, constant(0x1.715476p+0f)));
  vec::f32 r = vec::fma(n, constant(-0x1.62e400p-1f), x);  // ln 2 in two parts
  r = vec::fma(n, constant(-0x1.7f7d1cp-20f), r);
  constexpr float c[] = {0x1p-1f, 0x1.5554dcp-3f, 0x1.5554eap-5f, 0x1.120b66p-7f, 0x1.6d4312p-10f};
  const vec::f32 p = vec::fma(vec::mul(r, r), polynomial(r, c), r);
  return times(vec::add(p, constant(1.0f)), n);
}

// e^x to 2 ulp; 0 below -87.7, infinity above 88.4. NaN passes: it is the second operand.
inline vec::f32 exp(vec::f32 x) {
  return exp_by(vec::max(constant(-88.0f), vec::min(constant(89.0f), x)),
                [](vec::f32 p, vec::f32 n) { return vec::mul(p, vec::exp2_integral(n)); });
}

// The same bits for x up to zero, in fewer instructions where vectors can be scaled by powers of two.
inline vec::f32 exp_up_to_one(vec::f32 x) {
  return exp_by(vec::max(constant(-88.0f), x), [](vec::f32 p, vec::f32 n) { return vec::times_exp2(p, n); });
}

// 2^r of r in [-1/2, 1/2]: to 1.4 * 2^-24 of itself; and to 2.7e-6, a thousandth of what rounding to bf16 may do.
inline vec::f32 exp2_fraction(vec::f32 r) {
  constexpr float c[] = {1.0f,           0x1.62e432p-1f,  0x1.ebfbe2p-3f, 0x1.c6ae72p-5f,
                         0x1.3b270ep-7f, 0x1.5f7276p-10f, 0x1.470b4ap-13f};
  return polynomial(r, c);
}
inline vec::f32 exp2_fraction_for_bf16(vec::f32 r) {
  constexpr float c[] = {0x1.ffffe8p-1f, 0x1.62e0dcp-1f, 0x1.ec06dap-3f, 0x1.ca1440p-5f, 0x1.3997d6p-7f};
  return polynomial(r, c);
}

// x * sigmoid(s)
inline vec::f32 times_sigmoid(vec::f32 x, vec::f32 s) {
  return vec::div(x, vec::add(constant(1.0f), exp(vec::sub(vec::zero(), s))));
}

inline vec::f32 gelu_tanh(vec::f32 x) {  // 1 + tanh(u) = 2 sigmoid(2u)
  const vec::f32 cubic = vec::fma(vec::mul(x, x), constant(0.044715f), constant(1.0f));
  return times_sigmoid(x, vec::mul(vec::mul(x, cubic), constant(1.5957691216057308f)));
}

inline vec::f32 gelu_erf(vec::f32 x) {
  // erfc(z) = e^(-z^2) P(t), t = 1 / (1 + z/2), z >= 0; a least-squares fit, relative error 2.5e-7
  constexpr float c[] = {1.31065553e-05f, 0.28172943f, 0.286536247f, 0.215788916f,  0.314592481f, -0.326097161f,
                         0.809521079f,    -1.1065644f, 0.739632368f, -0.249991477f, 0.0348394252f};
  // Beyond z = 9.4 erfc is zero in fp32, and the square of a larger one could be infinite.
  const vec::f32 z = vec::min(constant(11.0f), vec::mul(vec::abs(x), constant(0.70710678118654752f)));
  const vec::f32 square = vec::mul(z, z), rest = vec::fma(z, z, vec::sub(vec::zero(), square));
  const vec::f32 t = vec::div(constant(1.0f), vec::fma(z, constant(0.5f), constant(1.0f)));
  const vec::f32 gauss = exp_up_to_one(vec::sub(vec::zero(), square));
  const vec::f32 erfc = vec::mul(vec::fma(gauss, vec::sub(vec::zero(), rest), gauss), polynomial(t, c));
  const vec::f32 half = vec::mul(x, constant(0.5f));
  return vec::select_negative(x, vec::mul(half, erfc), vec::mul(half, vec::sub(constant(2.0f), erfc)));
}

// To an absolute error of 2e-7.
inline vec::f32 tanh(vec::f32 x) {
  const vec::f32 t = exp_up_to_one(vec::mul(vec::abs(x), constant(-2.0f)));
  const vec::f32 y = vec::div(vec::sub(constant(1.0f), t), vec::add(constant(1.0f), t));
  return vec::select_negative(x, vec::sub(vec::zero(), y), y);
}

// sin(x + quarter * pi / 2) for |x| up to 2^20, in plain arithmetic on doubles, which loops make vectors of.
[[gnu::always_inline]] inline float near_sine(double x, std::int64_t quarter) {
  constexpr double shift = 0x1.8p52;  // behind it a double is an integer, in its lowest bits
  const double shifted = x * 0x1.45f306dc9c883p-1 + shift, n = shifted - shift;
  const double r = (x - n * 0x1.921fb544p+0) - n * 0x1.0b4611a626331p-34;  // pi / 2 in two parts, the first exact
  const double z = r * r;
  const double sine =
      r * (1.0 + z * (-1.0 / 6 +
                      z * (1.0 / 120 +
                           z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800 + z * (1.0 / 6227020800)))))));
  const double cosine =
      1.0 + z * (-1.0 / 2 +
                 z * (1.0 / 24 +
                      z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 +
                                                                z * (1.0 / 479001600 + z * (-1.0 / 87178291200)))))));
  const std::int64_t quarters = __builtin_bit_cast(std::int64_t, shifted) + quarter;
  const auto bits = __builtin_bit_cast(std::int64_t, quarters & 1 ? cosine : sine);
  return static_cast<float>(__builtin_bit_cast(double, bits ^ ((quarters & 2) << 62)));
}

// The sine of each, or with one more quarter of a turn the cosine.
inline vec::f32 sine(vec::f32 x, std::int64_t quarter) {
  alignas(64) float all[vec::lanes], found[vec::lanes];
  vec::store(all, x);
  bool far = false;
  for (int i = 0; i < vec::lanes; ++i) {
    found[i] = near_sine(all[i], quarter);
    far |= !(__builtin_fabsf(all[i]) <= 0x1p20f);
  }
  for (int i = 0; far && i < vec::lanes; ++i)
    if (!(__builtin_fabsf(all[i]) <= 0x1p20f))
      found[i] = static_cast<float>(quarter ? __builtin_cos(all[i]) : __builtin_sin(all[i]));
  return vec::load(found);
}
