// Conversions between formats, exhaustively where that is cheap, and the activations over all magnitudes.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "check.h"
#include "layer.h"

namespace {

using kt::activation;
using kt::dtype;

void test_pack_and_unpack() {
  unsigned n = 8000;
  for (dtype type : dtypes)
    for (int layout = 0; layout < 8; ++layout)
      for (std::size_t size : {1, 33}) {
        layer_case c;
        c.source = type;
        c.format = float_format(type);
        c.interleaved = layout & 1;
        c.transposed = layout & 2;
        c.act.gated = layout & 4;
        c.hidden = size;
        c.intermediate = 20 - size / 2;
        layer l(c, ++n), target(c, ++n);
        for (random_weight* w : {&target.gate_up, &target.down})
          for (std::size_t i = 0; i < w->plain.size(); ++i) w->plain.set(i, NAN);
        const kt::experts packed = l.pack();
        for (int i = 0; i < c.experts; ++i)
          packed.unpack(i, target.gate_up.plain_view(target.gate_up.plain), target.down.plain_view(target.down.plain));
        check(target.gate_up.plain.bytes == l.gate_up.plain.bytes && target.down.plain.bytes == l.down.plain.bytes,
              "pack and unpack " + describe(c));
      }
}

// An expert that another layer took over, and took back after it was released and overwritten, is the same, and no
// other is touched.
void test_copying_of_experts() {
  unsigned n = 8400;
  std::vector<kt::weight_format> formats = quantized_formats();
  formats.push_back(float_format(dtype::bf16));
  for (const kt::weight_format& format : formats)
    for (int slices : {1, 2}) {
      layer_case c;
      c.format = format;
      c.source = dtype::bf16;
      c.experts = 3;
      c.hidden = 130;
      c.intermediate = 200;
      c.slices = slices;
      c.bias = true;
      layer l(c, ++n);
      kt::experts packed = l.pack(), untouched = l.pack(), other(packed.shape, format, std::vector<int>(slices, -1));
      const auto same = [&](const kt::experts& a, int i, const kt::experts& b, int j) {
        bool equal = true;
        for (std::size_t s = 0; s < a.slices.size(); ++s)
          for (auto weight : {&kt::expert_slice::gate_up, &kt::expert_slice::down}) {
            const kt::packed_weight &x = a.slices[s].*weight, &y = b.slices[s].*weight;
            equal &= std::memcmp(x.panel(i, 0), y.panel(j, 0), x.expert_bytes()) == 0;
            if (x.panel_bias(i, 0)) equal &= std::memcmp(x.panel_bias(i, 0), y.panel_bias(j, 0), x.panels() * 128) == 0;
          }
        return equal;
      };
      other.copy(2, packed, 1);
      check(same(other, 2, untouched, 1), "copy of an expert " + describe(c));
      packed.release(1);
      packed.fill(1, 0xff);
      check(!same(packed, 1, untouched, 1), "filled expert " + describe(c));
      packed.copy(1, other, 2);
      for (int i = 0; i < c.experts; ++i) check(same(packed, i, untouched, i), "experts after copies " + describe(c));
      std::vector<char> bytes(1 << 20);
      other.read(2, bytes.data()), packed.fill(1, 0xff), packed.write(1, bytes.data());
      for (int i = 0; i < c.experts; ++i) check(same(packed, i, untouched, i), "experts after bytes " + describe(c));
      kt::experts mapped(packed.shape, format, std::vector<int>(slices, -1));
      std::vector<kt::region> memory = packed.memory();
      mapped.map(memory);
      check(mapped.mapped() && !packed.mapped(), "mapped " + describe(c));
      for (int i = 0; i < c.experts; ++i) check(same(mapped, i, untouched, i), "mapped experts " + describe(c));
      check(throws<std::logic_error>([&] { mapped.copy(0, untouched, 0); }), "no copy into what is mapped");
      check(throws<std::logic_error>([&] { mapped.fill(0, 0xff); }), "no fill of what is mapped");
      check(throws<std::logic_error>([&] { mapped.write(0, bytes.data()); }), "no bytes into what is mapped");
      --memory[4 * slices - 2].bytes;
      check(throws<std::invalid_argument>([&] { mapped.map(memory); }), "shorter memory is refused");
      memory.pop_back();
      check(throws<std::invalid_argument>([&] { mapped.map(memory); }), "memory of fewer slices is refused");
    }
  const layer_case c;
  layer_case wider = c;
  wider.hidden += 32;
  kt::experts a = layer(c, ++n).pack();
  const kt::experts b = layer(wider, ++n).pack();
  check(throws<std::invalid_argument>([&] { a.copy(0, b, 0); }), "an expert of another shape is refused");
}

// What codes stand for, whole: of one slice and of several, rounded to every type.
void test_unpacking_of_codes() {
  unsigned n = 8500;
  for (const kt::weight_format& format : quantized_formats())
    for (dtype type : dtypes)
      for (bool large : {false, true}) {
        ++n;
        layer_case c;
        c.format = format;
        c.experts = 2;
        c.hidden = large ? 200 : 33;
        c.intermediate = large ? 300 : 7;
        c.slices = large ? 1 + static_cast<int>(n % 3) : 1;
        c.interleaved = n / 2 % 2;
        c.transposed = n / 4 % 2;
        c.act.gated = n % 5 != 0;
        if (quick && large) continue;
        layer l(c, n);
        const kt::experts packed = l.pack();
        elements gate_up(type, c.experts * l.rows() * c.hidden), down(type, c.experts * c.hidden * c.intermediate);
        for (elements* e : {&gate_up, &down})
          for (std::size_t i = 0; i < e->size(); ++i) e->set(i, NAN);
        for (int i = 0; i < c.experts; ++i) packed.unpack(i, l.gate_up.plain_view(gate_up), l.down.plain_view(down));
        const std::string label = "unpacking to " + std::string(name_of(type)) + " " + describe(c);
        for (const auto& [w, got] : {std::pair(&l.gate_up, &gate_up), std::pair(&l.down, &down)}) {
          bool right = true;
          for (std::size_t e = 0; e < w->experts; ++e)
            for (std::size_t i = 0; i < w->n; ++i)
              for (std::size_t k = 0; k < w->k; ++k)
                right = right && got->get(w->plain_places().at(e, i, k)) == floats::round_to(w->value(e, i, k), type);
          check(right, label);
        }
      }
}

std::string packing_error(const random_weight& w) {
  kt::packed_weight packed(w.format, static_cast<int>(w.experts), 2, 0, w.k, kt::column_map::plain(0, w.n), -1);
  try {
    packed.pack(1, w.quantized_view());
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return {};
}

void test_refused_scales() {
  using kt::format;
  using kt::scale_type;
  struct refused {
    kt::weight_format format;
    float scale;
  };
  const kt::weight_format mxfp4 = {format::mxfp4, 32, scale_type::e8m0}, int8 = {format::int8, 0, scale_type::f32};
  const kt::weight_format half = {format::int4, 32, scale_type::f16}, brain = {format::int4, 32, scale_type::bf16};
  std::vector<refused> all;
  for (const kt::weight_format& f : quantized_formats())
    for (float bad : {NAN, INFINITY, -INFINITY}) all.push_back({f, bad});
  for (float bad : {0.0f, 3.0f, -1.0f, 0x1p-121f, 0x1p121f, 0x1p-130f, 0.75f}) all.push_back({mxfp4, bad});
  for (float bad : {65536.0f, -65536.0f, 1e9f}) all.push_back({half, bad});
  for (float bad : {3.4e38f, -3.4e38f}) all.push_back({brain, bad});
  const refused right[] = {{mxfp4, 0x1p120f},   {mxfp4, 0x1p-120f}, {half, 65504.0f}, {brain, 0x1.fep127f},
                           {int8, 0x1.fep120f}, {half, 0.0f},       {brain, -1.5f},   {half, 0x1p-24f}};
  const auto error = [](const refused& r) {
    std::mt19937 random(8700);
    random_weight w(r.format, dtype::f32, 2, 35, 70, false, 1, random);
    w.scales[w.scale_places().at(1, 34, w.groups() - 1)] = r.scale;
    return packing_error(w);
  };
  for (const refused& r : all) {
    const std::string text = error(r);
    check(text.find("expert 1, row 34, group") != std::string::npos,
          name_of(r.format) + " with the scale " + std::to_string(r.scale) + ": '" + text + "'");
  }
  for (const refused& r : right) {
    const std::string text = error(r);
    check(text.empty(), name_of(r.format) + " with the scale " + std::to_string(r.scale) + ": '" + text + "'");
  }
}

// Every byte as a code, and as a zero point: all but those without a value are packed.
void test_refused_codes() {
  unsigned n = 8800;
  for (const kt::weight_format& f : quantized_formats())
    for (bool transposed : {false, true}) {
      std::mt19937 random(++n);
      random_weight w(f, dtype::f32, 2, 35, 170, transposed, 1, random);
      const bool four_bits = f.kind != kt::format::fp8 && f.group && f.kind != kt::format::int8;
      std::uint8_t& code = w.codes[w.code_places().at(1, 34, 169)];
      for (int byte = 0; byte < 256; ++byte) {
        code = static_cast<std::uint8_t>(byte);
        const bool refused = four_bits ? byte > 15 : f.kind == kt::format::fp8 ? (byte & 0x7f) == 0x7f : byte == 0x80;
        const std::string text = packing_error(w);
        const int value = four_bits || f.kind == kt::format::fp8 ? byte : static_cast<std::int8_t>(byte);
        const std::string wanted = "the code of expert 1, row 34, column 169 is " + std::to_string(value) + ";";
        check(refused ? text.rfind(wanted, 0) == 0 : text.empty(), name_of(f) + ", " + wanted + " '" + text + "'");
      }
      code = four_bits ? 8 : 0;
      for (int byte = 0; f.zero_points && byte < 256; ++byte) {
        w.zeros[w.scale_places().at(1, 34, w.groups() - 1)] = static_cast<std::uint8_t>(byte);
        const std::string text = packing_error(w), wanted = "the zero point of expert 1, row 34, group " +
                                                            std::to_string(w.groups() - 1) + " is " +
                                                            std::to_string(byte) + ";";
        check(byte > 15 ? text.rfind(wanted, 0) == 0 : text.empty(), name_of(f) + ", " + wanted + " '" + text + "'");
      }
    }
}

// All patterns of a type as the weights of one expert, read back in another type.
elements convert(const elements& from, dtype format, dtype to) {
  kt::experts_shape shape;
  shape.num_experts = 1;
  shape.hidden_size = 256;
  shape.intermediate_size = from.size() / 256;
  shape.act.gated = false;
  elements source = from, gate_up(to, from.size()), down(to, from.size());
  const auto view = [&](elements& e, std::ptrdiff_t k) { return kt::weight_view{e.bytes.data(), e.type, 0, k, 1}; };
  const auto rows = static_cast<std::ptrdiff_t>(shape.intermediate_size);
  kt::experts experts(shape, float_format(format));
  experts.pack(0, view(source, 256), view(source, rows));
  experts.unpack(0, view(gate_up, 256), view(down, rows));
  check(gate_up.bytes == down.bytes, "gate_up and down convert alike");
  return gate_up;
}

elements every_half(dtype type) {
  elements e(type, 65536);
  for (std::size_t i = 0; i < 65536; ++i)
    reinterpret_cast<std::uint16_t*>(e.bytes.data())[i] = static_cast<std::uint16_t>(i);
  return e;
}

// fp32 values around every value of a half-precision type and around the middles between neighbours.
elements values_around(dtype type) {
  elements e(dtype::f32, 65536 * 6);
  auto* x = reinterpret_cast<float*>(e.bytes.data());
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto h = static_cast<std::uint16_t>(i), next = static_cast<std::uint16_t>(i + 1);
    const int bits = floats::exponent_bits(type);
    const double value = floats::decode(h, bits), after = floats::decode(next, bits);
    float middle = static_cast<float>((value + after) / 2);
    if (!std::isfinite(middle)) middle = static_cast<float>(value * (1 + floats::unit(type)));
    const float v = static_cast<float>(value);
    const float around[] = {
        v,      middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY), std::nextafter(v, INFINITY),
        -middle};
    std::copy_n(around, 6, x + i * 6);
  }
  return e;
}

void check_bits(const elements& got, const elements& source, const std::string& what) {
  for (std::size_t i = 0; i < source.size(); ++i) {
    const double x = source.get(i), want = floats::round_to(x, got.type), y = got.get(i);
    if (std::isnan(x) ? std::isnan(y) : y == want && std::signbit(y) == std::signbit(want)) continue;
    char text[120];
    std::snprintf(text, sizeof text, ": %.9g became %.9g, expected %.9g", x, y, want);
    check(false, what + text);
    return;
  }
  check(true, what);
}

void test_conversion_of_weights() {
  for (dtype from : {dtype::f16, dtype::bf16})
    for (dtype to : dtypes) {
      const elements all = every_half(from);
      check_bits(convert(all, to, to), all, std::string("weights ") + name_of(from) + " to " + name_of(to));
      check_bits(convert(all, to, dtype::f32), convert(all, to, to), std::string("unpacking ") + name_of(to));
    }
  if (quick) return;
  for (dtype to : {dtype::f16, dtype::bf16}) {
    const elements around = values_around(to);
    check_bits(convert(around, to, to), around, std::string("weights fp32 to ") + name_of(to));
  }
}

void test_conversion_in_kernels() {
  const std::int32_t index[1] = {0};
  for (const kt::isa* i : isas) {
    for (dtype from : dtypes) {
      if (i->kernels->rows_in_bf16 && from != dtype::bf16) continue;
      elements source = from == dtype::f32 ? values_around(dtype::f16) : every_half(from);
      source.bytes.resize((65536 - 1) * size_of(from));  // no whole number of vectors
      elements packed(i->kernels->rows_in_bf16 ? dtype::bf16 : dtype::f32, 65536);
      {
        const kernel_mode mode;
        i->kernels->rows.pack({source.bytes.data(), from, 0, index, 1, source.size(), 65536, packed.bytes.data()});
      }
      const std::string label = std::string("rows of ") + name_of(from) + " [" + i->name + "]";
      check_bits(packed, source, label);
      check(packed.get(65535) == 0.0, label + ": the padding is zero");
    }
    for (dtype to : {dtype::f16, dtype::bf16}) {
      if (quick) continue;
      const elements around = values_around(to);
      elements out(to, around.size());
      {
        const kernel_mode mode;
        for (int columns : {32, 31})
          i->kernels->store({reinterpret_cast<const float*>(around.bytes.data()), nullptr, around.size() / 32, columns,
                             out.bytes.data(), to, 32});
      }
      const std::string label = std::string("stores of ") + name_of(to) + " [" + i->name + "]";
      for (std::size_t k = 0; k < around.size(); ++k) {
        const double x = around.get(k), want = floats::round_to(x, to), got = out.get(k);
        const bool denormal = std::fabs(x) < 0x1p-126;  // these may be kept or flushed
        if (std::isnan(x) ? std::isnan(got) : got == want || (denormal && got == 0)) continue;
        char text[120];
        std::snprintf(text, sizeof text, ": %.9g became %.9g, expected %.9g", x, got, want);
        check(false, label + text);
        break;
      }
    }
  }
}

std::vector<float> sweep() {
  std::vector<float> x;
  for (std::uint32_t i = 0; i < 65536; ++i) x.push_back(floats::from_bits(i << 16));
  const int steps = quick ? 2'000 : 300'000;
  for (int i = 0; i < steps; ++i) x.push_back(-100.0f + 200.0f * static_cast<float>(i) / static_cast<float>(steps));
  for (int i = 0; i < steps; ++i) x.push_back(-6.0f + 12.0f * static_cast<float>(i) / static_cast<float>(steps));
  for (float v : {88.2f, 88.3f, 88.37f, 88.38f, 88.5f, 88.7f, 88.73f, 89.0f, 87.2f, 87.3f, 87.34f, 127.0f, 128.0f})
    for (float s : {v, -v}) x.push_back(s);
  x.resize((x.size() + 31) / 32 * 32);
  return x;
}

// Relative error that a right result may have, in units of 2^-24. The argument of the exponential is rounded before.
double allowance(activation a, double x) {
  switch (a) {
    case activation::silu: return 3.5;
    case activation::gelu_tanh: return 5 + 3 * std::min(90.0, 1.6 * std::fabs(x + 0.044715 * x * x * x));
    case activation::gelu_erf: return 10 + 1.5 * std::min(200.0, x * x);
    default: return 1;
  }
}

double exact(activation a, double x) {
  switch (a) {
    case activation::silu: return x / (1 + std::exp(-x));
    case activation::gelu_tanh: return x / (1 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)));
    case activation::gelu_erf: return 0.5 * x * std::erfc(-x * 0.70710678118654752);
    case activation::relu: return x > 0 ? x : 0;
    default: return x > 0 ? x * x : 0;
  }
}

void check_activation(activation a, float x, float got, const std::string& label) {
  const double want = exact(a, x);
  bool right;
  if (std::isnan(x)) {
    right = std::isnan(got);
  } else if (std::isinf(x) && x < 0) {
    right = std::isnan(got) || got == 0;  // 0 or, as torch has it, -inf * 0
  } else if (std::fabs(want) > 3.4028234e38) {
    right = std::isinf(got) && got > 0;
  } else {
    right = std::fabs(got - want) <= allowance(a, x) * 0x1p-24 * std::fabs(want) + 1e-35;
  }
  if (right) {
    check(true, label);
    return;
  }
  char text[120];
  std::snprintf(text, sizeof text, "(%.9g) is %.9g, expected %.9g", x, got, want);
  check(false, label + text);
}

void test_activations() {
  const std::vector<float> x = sweep();
  for (const kt::isa* i : isas) {
    const kt::kernel_table& k = *i->kernels;
    auto* const activate = k.rows_in_bf16 ? k.int8_rows.activate : k.rows.activate;  // both write fp32
    for (activation a :
         {activation::silu, activation::gelu_tanh, activation::gelu_erf, activation::relu, activation::relu2})
      for (bool gated : {false, true}) {
        const int width = gated ? 16 : 32, rows = static_cast<int>(x.size()) / width;
        std::vector<float> c(x.size() * (gated ? 2 : 1), 1.0f), h(x.size(), NAN);  // up is 1
        for (int r = 0; r < rows; ++r) std::copy_n(x.data() + r * width, width, c.data() + r * 32);
        {
          const kernel_mode mode;
          for (int r = 0; r < rows; ++r)
            activate({c.data() + r * 32,
                      1,
                      nullptr,
                      {a, gated, 1.0f, 0.0f},
                      false,
                      0,
                      static_cast<std::size_t>(width),
                      h.data() + r * width});
        }
        const std::string label = std::string("[") + i->name + "] " + name_of(a);
        for (std::size_t k = 0; k < x.size(); ++k) check_activation(a, x[k], h[k], label);
      }
  }
}

}  // namespace

const std::vector<test> value_tests = {
    {"pack and unpack", test_pack_and_unpack},
    {"copying of experts", test_copying_of_experts},
    {"unpacking of codes", test_unpacking_of_codes},
    {"refused scales", test_refused_scales},
    {"refused codes", test_refused_codes},
    {"conversion of weights", test_conversion_of_weights},
    {"conversion in kernels", test_conversion_in_kernels},
    {"activations", test_activations},
};
