// Whole layers against the naive loop, and what a row's bits may not depend on.
#include <algorithm>
#include <atomic>
#include <thread>

#include "../src/block_gemm.h"
#include "check.h"
#include "layer.h"
#include "reference.h"

namespace {

using kt::activation;
using kt::dtype;

// Whether the kernels of `i` run this format on rows of this type, and not those of its fallback.
bool has_kernels(const kt::isa& i, const kt::weight_format& format, dtype input) {
  return &kt::kernels_for(i, format.kind, input) == i.kernels;
}

bool same(const outcome& a, const outcome& b, dtype type, const std::string& what) {
  if (!check(a.rows.size() == b.rows.size(), what + ": sizes differ")) return false;
  const std::ptrdiff_t at = first_difference(a.rows.data(), b.rows.data(), a.rows.size() / size_of(type), type);
  return check(at < 0, what + ": element " + std::to_string(at) + " has other bits");
}

// Leaves NaN in all memory that the context keeps between calls.
void poison(kt::context& context, const kt::experts& e, const kt::kernel_table& kernels, layer l) {
  for (std::size_t i = 0; i < l.hidden.size(); ++i) l.hidden.set(i, NAN);
  run(context, e, kernels, l);
}

outcome checked_run(int thread_count, const kt::isa& i, const kt::experts& e, const layer& l,
                    const std::string& label) {
  kt::context& context = threads(thread_count);
  poison(context, e, *i.kernels, l);
  outcome o = run(context, e, *i.kernels, l);
  check(o.error.empty(), label + ": " + o.error);
  check(o.gaps_kept, label + ": wrote beyond its rows");
  return o;
}

void compare_with_reference(const layer& l, const outcome& o, const std::string& label) {
  const expected want = reference(l);
  for (std::size_t i = 0; i < want.value.size(); ++i) {
    const double got = floats::load(o.rows.data(), l.c.input, i), error = std::fabs(got - want.value[i]);
    if (error <= want.bound[i]) continue;
    char text[160];
    std::snprintf(text, sizeof text, ": row %zu column %zu is %.9g, expected %.9g +- %.2g", i / l.c.hidden,
                  i % l.c.hidden, got, want.value[i], want.bound[i]);
    check(false, label + text);
    return;
  }
  check(true, label);
}

// The first instruction set of each order of summation against the reference, the others and other numbers of threads
// against its bits.
void run_case(const layer_case& c, unsigned seed) {
  layer l(c, seed);
  const kt::experts e = l.pack();
  struct first_of {
    const kt::isa* isa = nullptr;
    outcome o;
  };
  first_of orders[2];
  for (const kt::isa* i : isas) {
    if (!has_kernels(*i, c.format, c.input)) continue;
    const std::string label = describe(c) + " [" + i->name + "]";
    const outcome o = checked_run(2, *i, e, l, label);
    first_of& first = orders[i->kernels->tiles && !is_dynamic(c.format.kind)];
    if (!first.isa) {
      first = {i, o};
      compare_with_reference(l, o, label);
    } else {
      same(first.o, o, c.input, label + " against " + first.isa->name);
    }
  }
  for (const first_of& first : orders)
    for (int n : {1, 5}) {
      if (!first.isa || (first.isa->kernels->tiles && n == 5)) continue;
      const std::string label = describe(c) + " [" + first.isa->name + ", " + std::to_string(n) + " threads]";
      same(first.o, checked_run(n, *first.isa, e, l, label), c.input, label);
    }
}

std::vector<kt::activation_spec> activations() {
  std::vector<kt::activation_spec> all;
  for (activation a :
       {activation::silu, activation::gelu_tanh, activation::gelu_erf, activation::relu, activation::relu2})
    for (bool gated : {true, false}) all.push_back({a, gated, 1.0f, 0.0f});
  all.push_back({activation::silu, true, 1.0f, 0.5f});
  all.push_back({activation::swigluoai, true, 1.702f, 0.7f});
  all.push_back({activation::swigluoai, true, 1.0f, 0.0f});
  return all;
}

constexpr std::size_t few_tokens[] = {7, 1, 13, 2};

// Every format of floats, input, activation and layout once, each with another number of tokens.
void test_all_kinds() {
  unsigned n = 0;
  for (const kt::activation_spec& act : activations())
    for (dtype format : dtypes)
      for (dtype input : dtypes)
        for (int layout = 0; layout < 4; ++layout) {
          ++n;
          if (quick && n % 7 != 0) continue;
          layer_case c;
          c.act = act;
          c.format = float_format(format);
          c.input = input;
          c.source = n % 3 == 0 ? dtypes[n / 3 % 3] : format;
          c.interleaved = layout & 1;
          c.transposed = layout & 2;
          c.bias = n % 2;
          c.routing = dtypes[n / 2 % 3];
          c.ids = n % 5 == 0 ? kt::id_type::i32 : kt::id_type::i64;
          c.tokens = few_tokens[n % 4];
          if (quick) c.hidden = 35, c.intermediate = 18, c.tokens = 3;
          run_case(c, n);
        }
}

// Every quantised format with every activation and input, in one layout each.
void test_quantized_kinds() {
  unsigned n = 500;
  for (const kt::activation_spec& act : activations())
    for (const kt::weight_format& format : quantized_formats())
      for (dtype input : dtypes) {
        ++n;
        if (quick && n % 11 != 0) continue;
        layer_case c;
        c.act = act;
        c.format = format;
        c.input = input;
        c.source = dtypes[n % 3];
        c.interleaved = n / 3 % 2;
        c.transposed = n / 7 % 2;
        c.bias = n / 2 % 2;
        c.tokens = few_tokens[n % 4];
        if (quick) c.hidden = 35, c.intermediate = 18, c.tokens = 3;
        run_case(c, n);
      }
}

void test_shapes() {
  unsigned n = 1000;
  for (std::size_t hidden : {1, 2, 33})
    for (std::size_t intermediate : {1, 17})
      for (int experts : {1, 5})
        for (std::size_t tokens : {1, 7, 64}) {
          if (quick && (n++ % 5 != 0 || tokens == 64)) continue;
          for (const kt::weight_format& format : all_formats()) {
            if (!is_float(format.kind) && ++n % 4 != 0) continue;
            layer_case c;
            c.hidden = hidden;
            c.intermediate = intermediate;
            c.experts = experts;
            c.top_k = std::min(experts, 3);
            c.tokens = tokens;
            c.format = format;
            c.input = dtypes[(n + tokens) % 3];
            c.interleaved = n % 2;
            c.act.gated = n % 3 != 0;
            c.bias = true;
            run_case(c, ++n);
          }
        }
}

// K of several groups, of which the last is shorter.
void test_groups() {
  unsigned n = 1500;
  for (const kt::weight_format& format : quantized_formats())
    for (std::size_t hidden : {161, 290})
      for (std::size_t intermediate : {130, 97}) {
        if (quick && ++n % 9 != 0) continue;
        layer_case c;
        c.experts = 2;
        c.top_k = 2;
        c.hidden = hidden;
        c.intermediate = intermediate;
        c.tokens = few_tokens[n % 4];
        c.format = format;
        c.input = dtypes[n % 2 * 2];
        c.transposed = n / 2 % 2;
        c.act.kind = n % 3 ? activation::silu : activation::relu;
        run_case(c, ++n);
      }
}

void test_token_counts() {
  unsigned n = 2000;
  for (std::size_t tokens : {0, 1, 2, 7, 13, 64, 300})
    for (const kt::weight_format& format : all_formats())
      for (dtype input : dtypes) {
        const bool quantized = !is_float(format.kind);
        if (quantized && (++n % 3 != 0 || (tokens == 300 && n % 2))) continue;
        if (quick && (tokens > 13 || quantized)) continue;
        layer_case c;
        c.tokens = tokens;
        c.format = format;
        c.input = input;
        if (quick) c.hidden = 40, c.intermediate = 24;
        run_case(c, ++n);
      }
}

layer single_row(const layer& l, std::size_t t) {
  layer one = l;
  one.c.tokens = 1;
  const std::size_t row = l.hidden_stride() * size_of(l.c.input);
  one.hidden.bytes.assign(l.hidden.bytes.begin() + t * row, l.hidden.bytes.begin() + (t + 1) * row);
  const std::size_t slots = l.c.top_k * size_of(l.c.routing);
  one.weights.bytes.assign(l.weights.bytes.begin() + t * slots, l.weights.bytes.begin() + (t + 1) * slots);
  one.ids.assign(l.ids.begin() + t * l.c.top_k, l.ids.begin() + (t + 1) * l.c.top_k);
  return one;
}

void check_rows_alone(const layer& l, const kt::experts& e, const kt::isa& i, const outcome& batch,
                      const std::string& label) {
  const std::size_t row = l.c.hidden * size_of(l.c.input), step = l.c.tokens > 64 ? 7 : 1;
  for (std::size_t t = 0; t < l.c.tokens; t += step) {
    const outcome alone = run(threads(t % 2 ? 5 : 1), e, *i.kernels, single_row(l, t));
    const std::ptrdiff_t at = first_difference(alone.rows.data(), batch.rows.data() + t * row, l.c.hidden, l.c.input);
    if (!check(at < 0, label + ": row " + std::to_string(t) + " alone has other bits at " + std::to_string(at))) return;
  }
}

void test_rows_do_not_depend_on_the_batch() {
  for (std::size_t tokens : {2, 13, 300})
    for (const kt::weight_format& format : all_formats())
      for (const kt::isa* i : isas) {
        layer_case c;
        c.tokens = tokens;
        c.format = format;
        c.input = format.kind == kt::format::f32   ? dtype::f32
                  : format.kind == kt::format::f16 ? dtype::f16
                                                   : dtype::bf16;
        if (!has_kernels(*i, format, c.input) || (quick && tokens > 13)) continue;
        if (tokens > 13 && i->kernels->tiles) continue;  // the tests of linear layers have these
        layer l(c, 3000 + static_cast<unsigned>(tokens));
        const kt::experts e = l.pack();
        const std::string label = describe(c) + " [" + i->name + "]";
        check_rows_alone(l, e, *i, checked_run(2, *i, e, l, label), label);
      }
}

// Slices of the experts change the order of summation, and nothing else.
void test_slices() {
  unsigned n = 2500;
  for (const kt::weight_format& format : all_formats())
    for (int slices : {2, 3}) {
      if (quick && ++n % 8 != 0) continue;
      layer_case c;
      c.experts = 3;
      c.top_k = 2;
      c.hidden = 72;
      c.intermediate = slices == 2 ? 137 : 300;
      c.slices = slices;
      c.format = format;
      c.input = dtypes[n % 2 * 2];
      c.tokens = few_tokens[n % 4];
      c.interleaved = n / 2 % 2;
      c.transposed = n / 4 % 2;
      c.bias = true;
      c.act.kind = n % 3 ? activation::silu : activation::relu;
      run_case(c, ++n);
      if (n % 3 == 0) continue;
      c.tokens = 40;
      layer l(c, ++n);
      const kt::experts e = l.pack();
      check(e.slices.size() == static_cast<std::size_t>(slices), "slices of " + describe(c));
      for (const kt::isa* i : isas) {
        if (!has_kernels(*i, format, c.input)) continue;
        const std::string label = describe(c) + " [" + i->name + "]";
        check_rows_alone(l, e, *i, checked_run(2, *i, e, l, label), label);
      }
    }
}

// Rows that do not fit into the cache: the products of both phases are blocked in K.
void test_wide() {
  if (quick) return;
  for (const kt::weight_format& format : all_formats())
    for (const kt::isa* i : isas) {
      if (!has_kernels(*i, format, dtype::bf16) || (i->kernels->tiles && std::string(i->name) != "amx")) continue;
      const kt::row_kernels& rows = i->kernels->rows_for(format.kind);
      const bool slow = std::string(i->name) == "scalar";
      if (slow && format.zero_points) continue;
      layer_case c;
      c.experts = c.top_k = 1;
      c.format = format;
      c.tokens = 131;
      c.act.gated = false;
      const std::size_t wide = kt::l2_bytes() / 2 / 128 / rows.bytes * 3 / 2 + 77;
      for (bool up : {true, false}) {
        c.hidden = up ? wide : 5;
        c.intermediate = up ? 5 : wide;
        layer l(c, 3500);
        const kt::experts e = l.pack();
        const std::string label = describe(c) + " [" + i->name + "]";
        const outcome batch = checked_run(2, *i, e, l, label);
        const std::size_t row = c.hidden * size_of(c.input);
        for (std::size_t t : {0, 57, 130}) {
          const outcome alone = run(threads(1), e, *i->kernels, single_row(l, t));
          check(std::equal(alone.rows.begin(), alone.rows.end(), batch.rows.begin() + t * row),
                label + ": row " + std::to_string(t) + " alone has other bits");
        }
      }
    }
}

// A row of NaN and one of infinities stay among themselves, and every instruction set makes the same of them.
void test_rows_that_are_no_numbers() {
  for (const kt::weight_format& format : all_formats()) {
    if (quick && format.group) continue;
    layer_case c;
    c.tokens = 13;
    c.format = format;
    c.input = format.kind == kt::format::f32 ? dtype::f32 : format.kind == kt::format::f16 ? dtype::f16 : dtype::bf16;
    layer l(c, 4000);
    for (std::size_t k = 0; k < c.hidden; ++k) l.hidden.set(5 * l.hidden_stride() + k, k % 2 ? INFINITY : -INFINITY);
    l.hidden.set(7 * l.hidden_stride() + c.hidden - 1, -INFINITY);
    l.hidden.set(9 * l.hidden_stride() + 3, NAN);
    const kt::experts e = l.pack();
    const bool dynamic = is_dynamic(format.kind);
    outcome orders[2];
    for (const kt::isa* i : isas) {
      if (!has_kernels(*i, format, c.input)) continue;
      const std::string label = describe(c) + " with NaN rows [" + i->name + "]";
      const outcome o = checked_run(2, *i, e, l, label);
      outcome& first = orders[i->kernels->tiles && !dynamic];
      if (first.rows.empty()) first = o;
      same(first, o, c.input, label);
      check_rows_alone(l, e, *i, o, label);
      for (std::size_t row = 0; row < c.tokens; ++row) {
        const bool lost = row == 9 || (dynamic && (row == 5 || row == 7));
        for (std::size_t n = 0; n < c.hidden; ++n) {
          const bool nan = is_nan(o.rows.data() + (row * c.hidden + n) * size_of(c.input), c.input);
          if (lost ? nan : (!nan || row == 5 || row == 7)) continue;
          check(false, label + ": row " + std::to_string(row) + (nan ? " has a NaN" : " lost its NaN"));
          return;
        }
      }
    }
  }
}

void test_ids_and_weights() {
  layer_case c;
  c.tokens = 4;
  c.input = dtype::f32;
  c.source = dtype::f32;
  c.format = float_format(dtype::f32);
  for (kt::id_type ids : {kt::id_type::i64, kt::id_type::i32})
    for (const kt::isa* i : isas) {
      if (!has_kernels(*i, c.format, c.input)) continue;
      c.ids = ids;
      layer l(c, 5000);
      const kt::experts e = l.pack();
      const std::string label = std::string("[") + i->name + "] ";
      l.ids[1] = c.experts;
      l.ids[4] = 0x7fffffff;
      l.weights.set(4, NAN);  // of a slot that is skipped
      for (int s = 0; s < c.top_k; ++s) l.ids[2 * c.top_k + s] = c.experts + s;
      const outcome o = checked_run(2, *i, e, l, label + "skipped ids");
      compare_with_reference(l, o, label + "skipped ids");
      const std::vector<char> zero(c.hidden * sizeof(float));
      check(std::equal(zero.begin(), zero.end(), o.rows.begin() + 2 * zero.size()),
            label + "no expert: a row of zeros");

      layer negative = l;
      negative.ids[3 * c.top_k + 1] = -7;
      const std::string wrong_id = run(threads(2), e, *i->kernels, negative).error;
      check(wrong_id.find("topk_ids[3, 1] is -7") != std::string::npos, label + "negative id: '" + wrong_id + "'");
      for (double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
        layer no_number = l;
        no_number.ids[1 * c.top_k + 2] = 0;
        no_number.weights.set(1 * c.top_k + 2, bad);
        const std::string text = run(threads(2), e, *i->kernels, no_number).error;
        const std::string value = std::isnan(bad) ? "nan" : bad < 0 ? "-inf" : "inf";
        check(text.find("topk_weights[1, 2] is " + value) != std::string::npos,
              label + value + " weight: '" + text + "'");
      }
      check(run(threads(2), e, *i->kernels, l).error.empty(), label + "a right call after wrong ones");
    }
}

// So many rows that the hidden activations do not fit at once: the call runs in parts.
void test_long_input() {
  if (quick) return;
  layer_case c;
  c.hidden = c.intermediate = 1;
  c.experts = 2;
  c.top_k = 8;
  c.tokens = 270'000;
  c.source = c.input = dtype::f32;
  c.format = float_format(dtype::f32);
  const auto fast = std::find_if(isas.begin(), isas.end(), [&](const kt::isa* i) {
    return has_kernels(*i, c.format, c.input) && std::string(i->name) != "scalar";
  });
  if (fast == isas.end()) return;
  const kt::isa& isa = **fast;
  layer l(c, 6000);
  const kt::experts e = l.pack();
  const outcome o = run(threads(2), e, *isa.kernels, l);
  check(o.error.empty() && o.gaps_kept, "long input: " + o.error);
  for (std::size_t t = 0; t < c.tokens; t += t < 262'140 || t > 262'150 ? 10'007 : 1) {
    const outcome alone = run(threads(1), e, *isa.kernels, single_row(l, t));
    const char* row = o.rows.data() + t * sizeof(float);
    if (!check(first_difference(alone.rows.data(), row, 1, c.input) < 0, "long input: row " + std::to_string(t)))
      return;
    if (t < 262'140 && t + 10'007 > 262'140) t = 262'140 - 10'007;
  }
  l.ids[269'999 * 8 + 5] = -2;
  const std::string error = run(threads(2), e, *isa.kernels, l).error;
  check(error.find("topk_ids[269999, 5] is -2") != std::string::npos, "long input, negative id: " + error);
}

void test_calls_from_several_threads() {
  layer_case c;
  c.tokens = 13;
  layer l(c, 7000);
  const kt::experts e = l.pack();
  const kt::kernel_table& kernels = *isas.front()->kernels;
  kt::context context(3);
  const outcome want = run(context, e, kernels, l);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int n = 0; n < 4; ++n)
    callers.emplace_back([&] {
      for (int i = 0; i < (quick ? 3 : 25); ++i) wrong += run(context, e, kernels, l).rows != want.rows;
    });
  for (std::thread& t : callers) t.join();
  check(wrong == 0, std::to_string(wrong) + " concurrent calls gave something else");
}

}  // namespace

const std::vector<test> layer_tests = {
    {"all kinds", test_all_kinds},
    {"quantised kinds", test_quantized_kinds},
    {"shapes", test_shapes},
    {"groups", test_groups},
    {"token counts", test_token_counts},
    {"rows alone", test_rows_do_not_depend_on_the_batch},
    {"slices", test_slices},
    {"wide layers", test_wide},
    {"rows that are no numbers", test_rows_that_are_no_numbers},
    {"ids and weights", test_ids_and_weights},
    {"long input", test_long_input},
    {"several callers", test_calls_from_several_threads},
};
