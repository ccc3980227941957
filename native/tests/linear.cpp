// Linear layers against the sums that kt/kernels.h defines, bit for bit, in every format and on every instruction set.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "../src/block_gemm.h"
#include "check.h"
#include "layer.h"
#include "reference.h"

namespace {

using kt::dtype;
using kt::format;

struct linear_case {
  kt::weight_format weights;
  std::size_t rows = 7, k = 72, n = 33;
  dtype type = dtype::bf16;
  bool bias = false, transposed = false;
};

std::string describe(const linear_case& c) {
  return name_of(c.weights) + " rows " + std::to_string(c.rows) + " K " + std::to_string(c.k) + " N " +
         std::to_string(c.n) + " of " + name_of(c.type) + (c.transposed ? " transposed" : "") +
         (c.bias ? " with bias" : "");
}

dtype type_for(const kt::weight_format& f) {
  return f.kind == format::f32 ? dtype::f32 : f.kind == format::f16 ? dtype::f16 : dtype::bf16;
}

class linear_layer {
  std::mt19937 random_;

 public:
  linear_case c;
  random_weight weight;
  elements bias, in;

  linear_layer(const linear_case& k, unsigned seed)
      : random_(seed),
        c(k),
        weight(c.weights, type_for(c.weights), 1, c.n, c.k, c.transposed, 1.7 / std::sqrt(static_cast<double>(c.k)),
               random_),
        bias(dtype::f32, c.n),
        in(c.type, c.rows * in_stride()) {
    std::uniform_real_distribution<double> uniform(-1.7, 1.7);
    for (std::size_t i = 0; i < c.n; ++i) bias.set(i, uniform(random_));
    for (std::size_t r = 0; r < c.rows; ++r)
      for (std::size_t i = 0; i < in_stride(); ++i)
        in.set(r * in_stride() + i, i >= c.k ? NAN : random_() % 64 ? uniform(random_) : 0);
  }

  std::size_t in_stride() const { return c.k + hidden_gap; }
  std::size_t out_stride() const { return c.n + out_gap; }

  kt::packed_weight pack() {
    const std::size_t panels = (c.n + kt::panel_columns - 1) / kt::panel_columns;
    kt::packed_weight w(c.weights, 1, panels, 0, c.k, kt::column_map::plain(0, c.n), -1);
    weight.with_view([&](const auto& view) { w.pack(0, view); });
    if (c.bias) w.pack_bias({bias.bytes.data(), dtype::f32, 0, 1});
    return w;
  }

  // The result in row r and column n: as kt/kernels.h defines it, in fp32, before it is stored.
  float defined(std::size_t r, std::size_t n) const {
    std::vector<float> x(c.k + 1);
    for (std::size_t k = 0; k < c.k; ++k) x[k] = static_cast<float>(in.get(r * in_stride() + k));
    float y;
    if (is_dynamic(c.weights.kind))
      y = static_cast<float>(dynamic_product({c.weights, x.data(), nullptr, c.k}, weight, 0, n, 0).value);
    else
      y = sum(x, n);
    return c.bias ? y + static_cast<float>(bias.get(n)) : y;
  }

  // Bound on the error of any other order of summation.
  double bound(std::size_t r, std::size_t n) const {
    double size = c.bias ? std::fabs(bias.get(n)) : 0;
    for (std::size_t k = 0; k < c.k; ++k) size += std::fabs(in.get(r * in_stride() + k) * weight.value(0, n, k));
    const double error = 2 * (static_cast<double>(c.k) + 8) * eps * size;
    return error + floats::unit(c.type) * 2.02 * size + floats::smallest(c.type);
  }

 private:
  // k [begin, end), from `acc` on.
  template <class Value>
  static float pairs(float acc, const std::vector<float>& x, std::size_t begin, std::size_t end, Value value) {
    for (std::size_t k = begin; k < end; k += 2) {
      if (k + 1 < end) acc = std::fma(x[k + 1], static_cast<float>(value(k + 1)), acc);
      acc = std::fma(x[k], static_cast<float>(value(k)), acc);
    }
    return acc;
  }

  float sum(const std::vector<float>& x, std::size_t n) const {
    const auto value = [&](std::size_t k) { return weight.value(0, n, k); };
    const auto code = [&](std::size_t k) { return weight.code(0, n, k); };
    if (is_float(c.weights.kind)) return pairs(0, x, 0, c.k, value);
    if (!c.weights.group) return pairs(0, x, 0, c.k, code) * weight.scale(0, n, 0);
    float total = 0;
    for (std::size_t g = 0; g * weight.group() < c.k; ++g) {
      const std::size_t begin = g * weight.group(), end = std::min(begin + weight.group(), c.k);
      total = std::fma(weight.scale(0, n, begin), pairs(0, x, begin, end, code), total);
    }
    return total;
  }
};

// Rows [first, first + rows) of the layer's input.
outcome run(kt::context& context, const kt::packed_weight& w, const kt::kernel_table& kernels, const linear_layer& l,
            const elements& in, std::size_t first, std::size_t rows) {
  elements out(l.c.type, rows * l.out_stride() + guard);
  for (std::size_t i = 0; i < out.size(); ++i) out.set(i, NAN);
  const std::vector<char> before = out.bytes;
  context.linear(w, kernels,
                 {rows, l.c.k, l.c.n, in.bytes.data() + first * l.in_stride() * size_of(l.c.type), l.c.type,
                  l.in_stride(), out.bytes.data(), l.out_stride()});
  outcome result;
  take_rows(result, out, before, rows, l.c.n, l.out_stride());
  return result;
}

// With NaN in all memory that the context kept from the call before.
outcome checked_run(int thread_count, const kt::packed_weight& w, const kt::kernel_table& kernels,
                    const linear_layer& l, std::size_t first, std::size_t rows, const std::string& label) {
  elements no_numbers = l.in;
  for (std::size_t i = 0; i < no_numbers.size(); ++i) no_numbers.set(i, NAN);
  run(threads(thread_count), w, kernels, l, no_numbers, first, rows);
  outcome o = run(threads(thread_count), w, kernels, l, l.in, first, rows);
  check(o.gaps_kept, label + ": wrote beyond its rows");
  return o;
}

bool has_kernels(const kt::isa& i, const kt::weight_format& f, dtype type) {
  return &kt::kernels_for(i, f.kind, type) == i.kernels;
}

bool own_order(const kt::isa& i, const kt::weight_format& f) { return i.kernels->tiles && !is_dynamic(f.kind); }

void same(const outcome& a, std::size_t first, const outcome& b, std::size_t rows, const linear_layer& l,
          const std::string& what) {
  const std::size_t row = l.c.n * size_of(l.c.type);
  const std::ptrdiff_t at = first_difference(a.rows.data() + first * row, b.rows.data(), rows * l.c.n, l.c.type);
  check(at < 0, what + ": element " + std::to_string(at) + " has other bits");
}

// `rows`: which of them are compared.
void compare(const linear_layer& l, const outcome& o, const kt::isa& i, const std::vector<std::size_t>& rows,
             const std::string& label) {
  const kernel_mode mode;
  for (std::size_t r : rows)
    for (std::size_t n = 0; n < l.c.n; ++n) {
      const double got = floats::load(o.rows.data(), l.c.type, r * l.c.n + n);
      const double want = floats::round_to(l.defined(r, n), l.c.type);
      if (own_order(i, l.c.weights) ? std::fabs(got - want) <= l.bound(r, n) : got == want) continue;
      char text[120];
      std::snprintf(text, sizeof text, ": row %zu column %zu is %.9g, expected %.9g", r, n, got, want);
      check(false, label + text);
      return;
    }
  check(true, label);
}

std::vector<std::size_t> first_rows(std::size_t n) {
  std::vector<std::size_t> rows(n);
  for (std::size_t i = 0; i < n; ++i) rows[i] = i;
  return rows;
}

void test_linear_kinds() {
  constexpr std::size_t ks[] = {1, 2, 31, 72, 127, 200, 257, 390}, ns[] = {1, 31, 33, 64, 70}, rows[] = {1, 2, 5, 17};
  unsigned n = 10'000;
  for (const kt::weight_format& f : all_formats())
    for (std::size_t k : ks)
      for (dtype type : dtypes) {
        ++n;
        if (quick && n % 5 != 0) continue;
        linear_case c{f, rows[n % 4], k, ns[n % 5], type, n % 2 == 0, n / 2 % 2 == 0};
        linear_layer l(c, n);
        const kt::packed_weight w = l.pack();
        outcome of_tiles;
        for (const kt::isa* i : isas) {
          if (!has_kernels(*i, f, type)) continue;
          const std::string label = describe(c) + " [" + i->name + "]";
          const outcome o = checked_run(2, w, *i->kernels, l, 0, c.rows, label);
          compare(l, o, *i, first_rows(c.rows), label);
          if (own_order(*i, f)) {
            if (of_tiles.rows.empty()) of_tiles = o;
            same(of_tiles, 0, o, c.rows, l, label);
          }
          for (int count : {1, 5}) {
            if (n % 3 != 0) continue;
            const std::string on = label + " on " + std::to_string(count) + " threads";
            same(o, 0, checked_run(count, w, *i->kernels, l, 0, c.rows, on), c.rows, l, on);
          }
        }
      }
}

// All numbers of rows up to a few tiles, and around blocks: each row as in a batch of 300.
void test_row_counts() {
  std::vector<std::size_t> counts = {47, 48, 49, 63, 65, 96, 127, 128, 129, 191, 255, 256, 257, 299};
  for (std::size_t i = 1; i <= 34; ++i) counts.push_back(i);
  if (quick) counts = {1, 2, 3, 5, 9, 14};
  unsigned n = 11'000;
  for (const kt::weight_format& f : all_formats())
    for (const kt::isa* i : isas) {
      const dtype type = type_for(f);
      if (!has_kernels(*i, f, type) || (quick && f.group == 64)) continue;
      // Emulation is slow, and tile_tests has all numbers of rows.
      const bool slow = std::string(i->name) == "amx_emu";
      linear_case c{f, quick ? 14u : slow ? 70u : 300u, slow || quick ? 72u : 200u, 70, type, true, false};
      linear_layer l(c, ++n);
      const kt::packed_weight w = l.pack();
      const std::string label = describe(c) + " [" + i->name + "]";
      const outcome all = checked_run(2, w, *i->kernels, l, 0, c.rows, label);
      compare(l, all, *i, quick ? first_rows(2) : std::vector<std::size_t>{0, 1, 63, c.rows - 1}, label);
      for (std::size_t count : counts) {
        if (count > c.rows || (slow && count > 3 && count % 16 > 1)) continue;
        const std::size_t first = c.rows - count;
        const std::string what = label + ": " + std::to_string(count) + " of its rows";
        same(all, first, run(threads(count % 2 + 1), w, *i->kernels, l, l.in, first, count), count, l, what);
      }
    }
}

// Weights of 16 bits that become fp32 once for many rows, and as they lie.
void test_widened() {
  unsigned n = 11'900;
  for (format kind : {format::bf16, format::f16})
    for (const kt::isa* i : isas) {
      const kt::weight_format f{kind};
      if (!has_kernels(*i, f, type_for(f)) || std::string(i->name) == "amx_emu") continue;
      linear_case c{f, 41, 390, 70, type_for(f), true, false};
      linear_layer l(c, ++n);
      const kt::packed_weight w = l.pack();
      const std::string label = describe(c) + " [" + i->name + "]";
      bool& widen = kt::habits().widen;
      const bool here = widen;
      widen = true;
      const outcome once = checked_run(2, w, *i->kernels, l, 0, c.rows, label + " widened");
      widen = false;
      same(once, 0, checked_run(2, w, *i->kernels, l, 0, c.rows, label), c.rows, l, label + " widened");
      widen = here;
      compare(l, once, *i, {0, 17, 40}, label + " widened");
    }
}

// Rows that do not fit into the cache: products are blocked in K, and for many panels in columns too.
void test_wide_linear() {
  if (quick) return;
  unsigned n = 12'000;
  for (const kt::weight_format& f : all_formats())
    for (const kt::isa* i : isas) {
      const dtype type = type_for(f);
      const std::string name = i->name;
      if (!has_kernels(*i, f, type) || name == "amx_emu" || (name == "scalar" && f.scale == kt::scale_type::f16))
        continue;
      const kt::row_kernels& kind = i->kernels->rows_for(f.kind);
      const std::size_t k = kt::l2_bytes() / 2 / 128 / kind.bytes * 3 / 2 + 77;
      const bool many = name != "scalar" && (f.kind == format::bf16 || f.group == 32 || f == int8_dyn);
      linear_case c{f, 250, k, many ? 700u : 37u, type, true, false};
      linear_layer l(c, ++n);
      const kt::packed_weight w = l.pack();
      const std::string label = describe(c) + " [" + i->name + "]";
      const outcome all = checked_run(2, w, *i->kernels, l, 0, c.rows, label);
      if (!many) compare(l, all, *i, {0, 71, 249}, label);
      for (std::size_t row : {0, 70, 249})
        same(all, row, run(threads(1), w, *i->kernels, l, l.in, row, 1), 1, l, label + ": a row alone");
      same(all, 0, checked_run(5, w, *i->kernels, l, 0, c.rows, label), c.rows, l, label + " on 5 threads");
    }
}

// One weight in column n, k = n, and rows of ones: every code times every scale, as it leaves the kernel.
void check_codes(const kt::weight_format& f, const std::vector<std::uint8_t>& codes, float scale, int zero, float x) {
  linear_case c{f, 3, codes.size(), codes.size(), dtype::f32};
  linear_layer l(c, 13'000);
  for (std::size_t n = 0; n < c.n; ++n) {
    for (std::size_t k = 0; k < c.k; ++k) {
      const bool here = k == n;
      l.weight.codes[l.weight.code_places().at(0, n, k)] = here ? codes[n]
                                                           : f.kind == format::int4 || f.kind == format::int4_dyn
                                                               ? static_cast<std::uint8_t>(f.zero_points ? zero : 8)
                                                               : 0;
    }
    for (std::size_t g = 0; g < l.weight.groups(); ++g) {
      l.weight.scales[l.weight.scale_places().at(0, n, g)] = scale;
      if (f.zero_points) l.weight.zeros[l.weight.scale_places().at(0, n, g)] = static_cast<std::uint8_t>(zero);
    }
  }
  for (std::size_t r = 0; r < c.rows; ++r)
    for (std::size_t k = 0; k < c.k; ++k) l.in.set(r * l.in_stride() + k, x);
  const kt::packed_weight w = l.pack();
  for (const kt::isa* i : isas)
    for (dtype type : {dtype::f32, dtype::bf16}) {
      if (!has_kernels(*i, f, type)) continue;
      linear_layer typed = l;
      typed.c.type = type;
      typed.in = elements(type, l.in.size());
      for (std::size_t k = 0; k < l.in.size(); ++k) typed.in.set(k, l.in.get(k));
      const std::string label = "codes of " + describe(typed.c) + " [" + i->name + "]";
      const outcome o = checked_run(1, w, *i->kernels, typed, 0, c.rows, label);
      for (std::size_t r = 0; r < c.rows; ++r)
        for (std::size_t n = 0; n < c.n; ++n) {
          const double got = floats::load(o.rows.data(), type, r * c.n + n);
          const double product = l.weight.code(0, n, n) * static_cast<double>(scale) * x;
          if (got == floats::round_to(product, type)) continue;
          check(false, label + ": code " + std::to_string(codes[n]) + " gave " + std::to_string(got) + ", not " +
                           std::to_string(product));
          return;
        }
      check(true, label);
    }
}

void test_codes() {
  std::vector<std::uint8_t> bytes, e4m3, four;
  for (int code = 0; code < 256; ++code) {
    if (code != 0x80) bytes.push_back(static_cast<std::uint8_t>(code));
    if ((code & 0x7f) != 0x7f) e4m3.push_back(static_cast<std::uint8_t>(code));
    if (code < 16) four.push_back(static_cast<std::uint8_t>(code));
  }
  for (const kt::weight_format& f : quantized_formats()) {
    if (quick && f.group == 64) continue;
    switch (f.kind) {
      case format::int8: check_codes(f, bytes, 0.0123291015625f, 0, 1); break;
      case format::int8_dyn: check_codes(f, bytes, 0.0123291015625f, 0, 127); break;  // the scale of the rows is 1
      case format::int4_dyn:
        for (int zero : {0, 7, 15}) check_codes(f, four, f.scale == kt::scale_type::f16 ? 0x1p-24f : -0.5f, zero, 127);
        break;
      case format::fp8: check_codes(f, e4m3, 0.0123291015625f, 0, 1); break;
      case format::mxfp4:
        check_codes(f, four, 1, 0, 1);
        check_codes(f, four, 0x1p-120f, 0, 1);
        check_codes(f, four, 0x1p120f, 0, 1);
        break;
      default:
        for (int zero : {0, 7, 15}) check_codes(f, four, f.scale == kt::scale_type::f16 ? 0x1p-24f : -0.5f, zero, 1);
    }
  }
}

// The greatest sums of integers, which stored as code + 128 pass 2^31 on their way.
void test_great_integers() {
  if (quick) return;
  linear_case c{int8_dyn, 2, 70'000, 2, dtype::f32};
  linear_layer l(c, 14'000);
  const std::size_t n1 = l.weight.code_places().n;
  for (std::size_t k = 0; k < c.k; ++k) {
    l.weight.codes[k] = 127;
    l.weight.codes[n1 + k] = 0x81;
    for (std::size_t r = 0; r < c.rows; ++r) l.in.set(r * l.in_stride() + k, r ? -3.5 : 3.5);
  }
  const kt::packed_weight w = l.pack();
  for (const kt::isa* i : isas) {
    const std::string label = describe(c) + " [" + i->name + "]";
    compare(l, checked_run(2, w, *i->kernels, l, 0, c.rows, label), *i, {0, 1}, label);
  }
}

std::vector<std::pair<kt::weight_format, dtype>> dynamic_cases() {
  std::vector<std::pair<kt::weight_format, dtype>> cases;
  for (const kt::weight_format& f : all_formats())
    for (dtype type : dtypes)
      if (is_dynamic(f.kind)) cases.push_back({f, type});
  return cases;
}

// Rows of dynamic formats: zeros, tiny and huge ones, ties; one that is no number stays alone.
void test_dynamic_rows() {
  for (const auto& [format, type] : dynamic_cases()) {
    linear_case c{format, 12, 75, 40, type};
    linear_layer l(c, 15'000);
    const auto row = [&](std::size_t r, auto value) {
      for (std::size_t k = 0; k < c.k; ++k) l.in.set(r * l.in_stride() + k, value(static_cast<int>(k)));
    };
    row(1, [](int) { return 0.0; });
    row(2, [](int k) { return k % 3 ? 1e-39 : -1e-39; });
    row(3, [](int k) { return (k - 40) * 0x1p-107; });
    row(4, [](int k) { return (k - 37) * 0x1p-104; });
    row(5, [](int k) { return k == 70 ? 127.0 : k % 63 + 0.5; });  // ties
    row(6, [](int k) { return k == 70 ? -127.0 : -(k % 63) - 0.5; });
    row(7, [](int k) { return (k - 37) * 1700.0; });
    if (type != dtype::f16) row(8, [](int k) { return (k - 37) * 0x1p121; });
    elements odd = l.in;
    const std::size_t stride = l.in_stride();
    odd.set(0 * stride + 74, NAN);
    odd.set(3 * stride + 0, INFINITY);
    odd.set(9 * stride + 73, -INFINITY);
    for (std::size_t k = 0; k < c.k; ++k) odd.set(11 * stride + k, NAN);
    const kt::packed_weight w = l.pack();
    for (const kt::isa* i : isas) {
      const std::string label = describe(c) + " [" + i->name + "]";
      const outcome o = checked_run(2, w, *i->kernels, l, 0, c.rows, label);
      compare(l, o, *i, first_rows(c.rows), label);
      const outcome with_odd = run(threads(2), w, *i->kernels, l, odd, 0, c.rows);
      const std::size_t bytes = c.n * size_of(type);
      for (std::size_t r = 0; r < c.rows; ++r) {
        const char* got = with_odd.rows.data() + r * bytes;
        if (r == 0 || r == 3 || r == 9 || r == 11) {
          bool all = true;
          for (std::size_t n = 0; n < c.n; ++n) all = all && is_nan(got + n * size_of(type), type);
          check(all, label + ": row " + std::to_string(r) + " must be NaN");
        } else {
          check(std::equal(got, got + bytes, o.rows.data() + r * bytes), label + ": a NaN went to another row");
        }
      }
    }
  }
}

// Every format that is not refused computes, and every format of the other tests is among them.
void test_formats() {
  using kt::scale_type;
  unsigned n = 17'000, allowed = 0;
  for (int kind = 0; kind < kt::num_formats; ++kind)
    for (int group : {0, 16, 32, 64, 96, 128, 256})
      for (scale_type scale : {scale_type::none, scale_type::f32, scale_type::f16, scale_type::bf16, scale_type::e8m0})
        for (bool zeros : {false, true}) {
          const kt::weight_format f = {static_cast<format>(kind), group, scale, zeros};
          const std::vector<kt::weight_format>& all = all_formats();
          const bool tested = std::any_of(all.begin(), all.end(), [&](const auto& other) { return other == f; });
          try {
            kt::check_format(f);
          } catch (const std::invalid_argument& e) {
            const std::string text = e.what(), given = "with group " + std::to_string(group) + ", scales ";
            check(!tested && text.find(given) != std::string::npos, text);
            continue;
          }
          ++allowed;
          linear_layer l({f, 5, 300, 33, type_for(f)}, ++n);
          const kt::packed_weight w = l.pack();
          for (const kt::isa* i : isas) {
            if (!has_kernels(*i, f, l.c.type)) continue;
            const std::string label = "allowed " + describe(l.c) + " [" + i->name + "]";
            compare(l, checked_run(2, w, *i->kernels, l, 0, l.c.rows, label), *i, first_rows(l.c.rows), label);
          }
        }
  check(allowed == 3 + 3 + 1 + 12 + 12 + 12 + 1, std::to_string(allowed) + " formats are allowed");
}

// Weights of several heads in one call, of rows that lie head beside head: each as a layer by itself, to the bit, with
// NaN between and behind rows, heads, and in the memory that the context kept.
void test_heads() {
  constexpr std::size_t ks[] = {1, 20, 72, 130}, ns[] = {1, 14, 33, 96}, rows[] = {1, 3, 40, 300},
                        counts[] = {1, 3, 16};
  unsigned n = 18'000;
  for (const kt::weight_format& f : all_formats())
    for (std::size_t k : ks) {
      ++n;
      if (quick && n % 3 != 0) continue;
      const linear_case c{f, quick ? 5 : rows[n % 4], k, ns[n / 2 % 4], dtypes[n % 3], n % 2 == 0, n / 2 % 2 == 0};
      const std::size_t heads = counts[n % 3], panels = (c.n + kt::panel_columns - 1) / kt::panel_columns;
      std::vector<linear_layer> layers;
      for (std::size_t h = 0; h < heads; ++h) layers.emplace_back(c, 100 * n + static_cast<unsigned>(h));
      kt::packed_weight w(f, static_cast<int>(heads), panels, 0, c.k, kt::column_map::plain(0, c.n), -1);
      std::vector<kt::packed_weight> alone;
      for (std::size_t h = 0; h < heads; ++h) w.copy(static_cast<int>(h), alone.emplace_back(layers[h].pack()), 0);
      const std::size_t in_head = layers[0].in_stride(), in_stride = heads * in_head + 3;
      const std::size_t out_head = layers[0].out_stride(), out_stride = heads * out_head + 5;
      elements in(c.type, c.rows * in_stride), no_numbers(c.type, c.rows * in_stride);
      for (std::size_t i = 0; i < in.size(); ++i) in.set(i, NAN), no_numbers.set(i, NAN);
      for (std::size_t r = 0; r < c.rows; ++r)
        for (std::size_t h = 0; h < heads; ++h)
          for (std::size_t i = 0; i < c.k; ++i)
            in.set(r * in_stride + h * in_head + i, layers[h].in.get(r * in_head + i));
      for (const kt::isa* i : isas) {
        if (!has_kernels(*i, f, c.type) || (std::string(i->name) == "amx_emu" && heads * c.rows > 200)) continue;
        const std::string label = std::to_string(heads) + " heads, " + describe(c) + " [" + i->name + "]";
        for (int count : {1, 2, 5}) {
          elements out(c.type, c.rows * out_stride + guard);
          for (std::size_t o = 0; o < out.size(); ++o) out.set(o, NAN);
          const std::vector<char> before = out.bytes;
          for (const elements* from : {&no_numbers, &in})
            threads(count).linear(w, *i->kernels,
                                  {c.rows, c.k, c.n, from->bytes.data(), c.type, in_stride, out.bytes.data(),
                                   out_stride, heads, in_head, out_head});
          const std::size_t size = size_of(c.type);
          for (std::size_t h = 0; h < heads; ++h) {
            const outcome wanted = run(threads(2), alone[h], *i->kernels, layers[h], layers[h].in, 0, c.rows);
            outcome got;
            for (std::size_t r = 0; r < c.rows; ++r) {
              const auto at = static_cast<std::ptrdiff_t>((r * out_stride + h * out_head) * size);
              const auto bytes = static_cast<std::ptrdiff_t>(c.n * size);
              got.rows.insert(got.rows.end(), out.bytes.begin() + at, out.bytes.begin() + at + bytes);
              std::copy_n(before.begin() + at, bytes, out.bytes.begin() + at);
            }
            same(wanted, 0, got, c.rows, layers[h], label + ": head " + std::to_string(h));
          }
          check(out.bytes == before, label + ": wrote beyond its rows");
        }
      }
    }
}

void test_no_rows() {
  linear_case c{float_format(dtype::f32), 1};
  linear_layer l(c, 16'000);
  check(run(threads(2), l.pack(), *isas.back()->kernels, l, l.in, 0, 0).gaps_kept, "no rows");
}

}  // namespace

const std::vector<test> linear_tests = {
    {"linear kinds", test_linear_kinds},
    {"linear rows", test_row_counts},
    {"widened weights", test_widened},
    {"wide linear", test_wide_linear},
    {"codes", test_codes},
    {"great integers", test_great_integers},
    {"dynamic rows", test_dynamic_rows},
    {"formats", test_formats},
    {"heads", test_heads},
    {"no rows", test_no_rows},
};
