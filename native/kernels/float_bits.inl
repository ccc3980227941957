// Bits of floats and halves, in plain C++.
constexpr std::uint32_t as_u32(float x) { return __builtin_bit_cast(std::uint32_t, x); }
constexpr float as_f32(std::uint32_t u) { return __builtin_bit_cast(float, u); }

inline float f16_to_f32(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t exponent = h >> 10 & 0x1fu, mantissa = h & 0x3ffu;
  if (exponent == 0) {  // zero or denormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return as_f32(sign | as_u32(magnitude));
  }
  if (exponent == 31) return as_f32(sign | 0x7f800000u | (mantissa ? mantissa << 13 | 0x00400000u : 0u));
  return as_f32(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Round to nearest even, as VCVTPS2PH does.
inline std::uint16_t f32_to_f16(float x) {
  const std::uint32_t u = as_u32(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal in fp16
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  } else if (magnitude <= 0x33000000u) {  // at most half of the smallest denormal
    half = 0;
  } else {
    const std::uint32_t shift = 126u - (magnitude >> 23), mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
    half = kept + (rest > tie || (rest == tie && (kept & 1u)));
  }
  return static_cast<std::uint16_t>(sign | half);
}

template <class T>
inline T load_as(const void* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

constexpr float e4m3_to_f32(int code) {
  const unsigned exponent = code >> 3 & 15u, mantissa = code & 7u;
  const float x = exponent ? as_f32((exponent + 120) << 23 | mantissa << 20) : static_cast<float>(mantissa) * 0x1p-9f;
  return code & 0x80 ? -x : x;
}
