// Random weights of every format, and what they stand for: by definition, independent of the code under test.
#pragma once
#include <kt/packed.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "floats.h"

inline const char* name_of(kt::dtype t) { return t == kt::dtype::f32 ? "fp32" : t == kt::dtype::f16 ? "fp16" : "bf16"; }

inline std::string name_of(const kt::weight_format& f) {
  static const char* const kinds[] = {"fp32", "fp16", "bf16", "int8", "int8_dyn", "int4", "fp8", "mxfp4", "int4_dyn"};
  static const char* const scales[] = {"", "", " scales fp16", " scales bf16", ""};
  std::string s = kinds[static_cast<int>(f.kind)];
  if (f.group) s += " g" + std::to_string(f.group);
  if (f.zero_points) s += " zp";
  return s + scales[static_cast<int>(f.scale)];
}

inline bool operator==(const kt::weight_format& a, const kt::weight_format& b) {
  return a.kind == b.kind && a.group == b.group && a.scale == b.scale && a.zero_points == b.zero_points;
}

constexpr kt::weight_format float_format(kt::dtype t) {
  return {t == kt::dtype::f32 ? kt::format::f32 : t == kt::dtype::f16 ? kt::format::f16 : kt::format::bf16};
}

constexpr kt::weight_format int8_dyn = {kt::format::int8_dyn, 0, kt::scale_type::f32};

// Formats with codes and scales.
inline const std::vector<kt::weight_format>& quantized_formats() {
  static const std::vector<kt::weight_format> all = [] {
    using kt::format;
    using kt::scale_type;
    std::vector<kt::weight_format> v = {{format::int8, 0, scale_type::f32},  int8_dyn,
                                        {format::fp8, 128, scale_type::f32}, {format::fp8, 0, scale_type::f32},
                                        {format::fp8, 64, scale_type::bf16}, {format::mxfp4, 32, scale_type::e8m0}};
    for (int group : {32, 64, 128})
      for (bool zeros : {false, true})
        for (scale_type scale : {scale_type::f16, scale_type::bf16})
          for (format kind : {format::int4, format::int4_dyn}) v.push_back({kind, group, scale, zeros});
    return v;
  }();
  return all;
}

inline const std::vector<kt::weight_format>& all_formats() {
  static const std::vector<kt::weight_format> all = [] {
    std::vector<kt::weight_format> v = quantized_formats();
    for (kt::dtype t : {kt::dtype::f32, kt::dtype::f16, kt::dtype::bf16}) v.push_back(float_format(t));
    return v;
  }();
  return all;
}

// Elements of one dtype in memory of exactly their size, so that a sanitizer sees each access beyond them.
struct elements {
  kt::dtype type;
  std::vector<char> bytes;
  elements(kt::dtype t, std::size_t n) : type(t), bytes(n * size_of(t)) {}
  void set(std::size_t i, double x) { floats::store(bytes.data(), type, i, x); }
  double get(std::size_t i) const { return floats::load(bytes.data(), type, i); }
  std::size_t size() const { return bytes.size() / size_of(type); }
};

inline double code_value(const kt::weight_format& f, std::uint8_t code, int zero) {
  switch (f.kind) {
    case kt::format::int4:
    case kt::format::int4_dyn: return code - (f.zero_points ? zero : 8);
    case kt::format::fp8: return floats::minifloat(code, 4, 3);
    case kt::format::mxfp4: return floats::minifloat(code, 2, 1);
    default: return static_cast<std::int8_t>(code);
  }
}

// A weight [experts][n][k]: plain elements of `source`, or codes with scales. Transposed: n is the inner dimension.
// Between rows of codes and of scales lie values that nothing may read.
class random_weight {
 public:
  kt::weight_format format;
  std::size_t experts, n, k;
  bool transposed;
  elements plain;
  std::vector<std::uint8_t> codes, zeros;
  std::vector<float> scales;

  // Weights are about as large as `size`.
  random_weight(const kt::weight_format& f, kt::dtype source, std::size_t experts_, std::size_t n_, std::size_t k_,
                bool transposed_, double size, std::mt19937& random)
      : format(f), experts(experts_), n(n_), k(k_), transposed(transposed_), plain(source, 0) {
    if (is_float(f.kind)) {
      plain = elements(source, experts * n * k);
      std::uniform_real_distribution<double> uniform(-size, size);
      for (std::size_t i = 0; i < plain.size(); ++i) {
        const unsigned kind = random() % 64;
        plain.set(i, kind == 0 ? 1e-39 : kind == 1 ? -0.0 : uniform(random));  // a few denormals: they count as zero
      }
      return;
    }
    codes.assign(experts * code_places().expert, f.kind == kt::format::fp8 ? 0x7f : 0x80);
    scales.assign(experts * scale_places().expert, NAN);
    if (f.zero_points) zeros.assign(scales.size(), 0xff);
    for (std::size_t e = 0; e < experts; ++e)
      for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t g = 0; g < groups(); ++g) {
          scales[scale_places().at(e, i, g)] = static_cast<float>(random_scale(size, random));
          if (f.zero_points) zeros[scale_places().at(e, i, g)] = random() % 16;
        }
        for (std::size_t j = 0; j < k; ++j) codes[code_places().at(e, i, j)] = random_code(random);
      }
  }

  std::size_t group() const { return format.group ? format.group : k; }
  std::size_t groups() const { return (k + group() - 1) / group(); }

  // Strides of (expert, n, k or group), in elements.
  struct places {
    std::size_t expert, n, k;
    std::size_t at(std::size_t e, std::size_t i, std::size_t j) const { return e * expert + i * n + j * k; }
  };
  places code_places() const { return placed(k, 3); }
  places scale_places() const { return placed(groups(), 1); }
  places plain_places() const { return placed(k, 0); }

  double value(std::size_t e, std::size_t i, std::size_t j) const {
    if (!is_float(format.kind)) return code(e, i, j) * static_cast<double>(scale(e, i, j));
    const kt::dtype stored = format.kind == kt::format::f32   ? kt::dtype::f32
                             : format.kind == kt::format::f16 ? kt::dtype::f16
                                                              : kt::dtype::bf16;
    return floats::round_to(plain.get(plain_places().at(e, i, j)), stored);
  }
  double code(std::size_t e, std::size_t i, std::size_t j) const {
    const int zero = format.zero_points ? zeros[scale_places().at(e, i, j / group())] : 0;
    return code_value(format, codes[code_places().at(e, i, j)], zero);
  }
  float scale(std::size_t e, std::size_t i, std::size_t j) const {
    return scales[scale_places().at(e, i, j / group())];
  }

  kt::weight_view plain_view(elements& e) const {
    const places p = plain_places();
    return {e.bytes.data(), e.type, signed_(p.expert), signed_(p.n), signed_(p.k)};
  }
  kt::quantized_view quantized_view() const {
    const places c = code_places(), s = scale_places();
    return {codes.data(),      signed_(c.expert), signed_(c.n),
            signed_(c.k),      scales.data(),     format.zero_points ? zeros.data() : nullptr,
            signed_(s.expert), signed_(s.n),      signed_(s.k)};
  }

  // Calls f with the view that this format is packed from.
  template <class F>
  void with_view(F f) {
    is_float(format.kind) ? f(plain_view(plain)) : f(quantized_view());
  }

 private:
  static std::ptrdiff_t signed_(std::size_t i) { return static_cast<std::ptrdiff_t>(i); }

  places placed(std::size_t inner, std::size_t gap) const {
    if (transposed) return {inner * (n + gap), 1, n + gap};
    return {n * (inner + gap), inner + gap, 1};
  }

  std::uint8_t random_code(std::mt19937& random) const {
    switch (format.kind) {
      case kt::format::int4:
      case kt::format::int4_dyn:
      case kt::format::mxfp4: return random() % 16;
      case kt::format::fp8: {
        const auto c = static_cast<std::uint8_t>(random() % 256);
        return (c & 0x7f) == 0x7f ? 0x7e : c;  // no NaN
      }
      default: return static_cast<std::uint8_t>(static_cast<int>(random() % 255) - 127);
    }
  }

  double random_scale(double size, std::mt19937& random) const {
    constexpr double largest[] = {1, 1, 1, 127, 127, 8, 448, 6, 8};
    const double x = size / largest[static_cast<int>(format.kind)] * (0.25 + random() % 1024 / 1024.0);
    if (format.kind == kt::format::mxfp4) return std::ldexp(1.0, std::ilogb(x));
    if (random() % 64 == 0) return 0;
    // Products of codes and scales of 16 bits are exact.
    return random() % 4 ? short_number(x) : -short_number(x);
  }
  double short_number(double x) const {
    if (format.scale == kt::scale_type::f16) return floats::round_to(x, kt::dtype::f16);
    if (format.scale == kt::scale_type::bf16) return floats::round_to(x, kt::dtype::bf16);
    const int exponent = std::ilogb(x);
    return std::ldexp(std::nearbyint(std::ldexp(x, 15 - exponent)), exponent - 15);
  }
};
