// Half-precision formats by their definition, in double: slow, and independent of the code under test.
#pragma once
#include <kt/kernels.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace floats {

inline float from_bits(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline std::uint32_t to_bits(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

// Sign, exponent and mantissa as IEEE 754 defines them, for a format of 16 bits.
inline double define(std::uint16_t h, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = h >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = h & ((1 << mantissa_bits) - 1);
  const double sign = h >> 15 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// A format of few bits without infinities, as e4m3 and e2m1. No code of NaN is given to it.
inline double minifloat(int code, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, mantissa = code & ((1 << mantissa_bits) - 1);
  const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                         : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return code >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
}

constexpr int f16_exponent = 5, bf16_exponent = 8;

inline double decode(std::uint16_t h, int exponent_bits) {
  const auto all = [](int bits) {
    std::vector<double> values;
    for (std::uint32_t i = 0; i < 65536; ++i) values.push_back(define(static_cast<std::uint16_t>(i), bits));
    return values;
  };
  static const std::vector<double> f16 = all(f16_exponent), bf16 = all(bf16_exponent);
  return (exponent_bits == f16_exponent ? f16 : bf16)[h];
}

// The nearest value of the format, ties to even. `x` is no NaN.
inline std::uint16_t encode(double x, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int infinity = ((1 << exponent_bits) - 1) << mantissa_bits, sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isinf(x)) return static_cast<std::uint16_t>(sign | infinity);
  const int exponent = x == 0 ? 1 - bias : std::max(1 - bias, std::ilogb(x));
  const double mantissa = std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent));
  // A mantissa that was rounded up to the next power of two carries into the exponent.
  const double pattern = std::ldexp(exponent + bias - 1, mantissa_bits) + mantissa;
  return static_cast<std::uint16_t>(sign | static_cast<int>(std::min<double>(pattern, infinity)));
}

inline int exponent_bits(kt::dtype t) { return t == kt::dtype::f16 ? f16_exponent : bf16_exponent; }

inline double load(const void* base, kt::dtype type, std::size_t i) {
  if (type == kt::dtype::f32) return static_cast<const float*>(base)[i];
  return decode(static_cast<const std::uint16_t*>(base)[i], exponent_bits(type));
}

inline void store(void* base, kt::dtype type, std::size_t i, double x) {
  if (type == kt::dtype::f32)
    static_cast<float*>(base)[i] = static_cast<float>(x);
  else
    static_cast<std::uint16_t*>(base)[i] =
        std::isnan(x) ? (type == kt::dtype::f16 ? 0x7e00 : 0x7fc0) : encode(x, exponent_bits(type));
}

inline double round_to(double x, kt::dtype type) {
  if (std::isnan(x)) return x;
  return type == kt::dtype::f32 ? static_cast<double>(static_cast<float>(x))
                                : decode(encode(x, exponent_bits(type)), exponent_bits(type));
}

// Half of the distance between neighbours, relative to the value.
inline double unit(kt::dtype t) { return t == kt::dtype::f32 ? 0x1p-24 : t == kt::dtype::f16 ? 0x1p-11 : 0x1p-8; }
// The same, absolute, for the smallest values.
inline double smallest(kt::dtype t) { return t == kt::dtype::f16 ? 0x1p-25 : 1e-36; }

}  // namespace floats
