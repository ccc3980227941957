// Whole layers against the naive loop, and what a row's bits may not depend on.
#include <algorithm>
#include <atomic>
#include <thread>

#include "check.h"
#include "layer.h"

namespace {

using kt::activation;
using kt::dtype;

// Whether the kernels of `i` run this format on rows of this type. VDPBF16PS needs both in bf16.
bool has_kernels(const kt::isa& i, dtype format, dtype input) {
  return i.kernels->gemm[static_cast<int>(format)] && (!i.kernels->rows_in_bf16 || input == dtype::bf16);
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
  const layer::expected want = l.reference();
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

// The best instruction set against the reference, the others and other numbers of threads against its bits.
void run_case(const layer_case& c, unsigned seed) {
  layer l(c, seed);
  const kt::experts e = l.pack();
  outcome first;
  const kt::isa* best = nullptr;
  for (const kt::isa* i : isas) {
    if (!has_kernels(*i, c.format, c.input)) continue;
    const std::string label = describe(c) + " [" + i->name + "]";
    const outcome o = checked_run(2, *i, e, l, label);
    if (!best) {
      best = i;
      first = o;
      compare_with_reference(l, o, label);
    } else {
      same(first, o, c.input, label + " against " + best->name);
    }
  }
  if (!best) return;
  for (int n : {1, 5}) {
    const std::string label = describe(c) + " [" + best->name + ", " + std::to_string(n) + " threads]";
    same(first, checked_run(n, *best, e, l, label), c.input, label);
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

// Every format, input, activation and layout once, each with another number of tokens.
void test_all_kinds() {
  constexpr std::size_t tokens[] = {7, 1, 13, 2};
  unsigned n = 0;
  for (const kt::activation_spec& act : activations())
    for (dtype format : dtypes)
      for (dtype input : dtypes)
        for (int layout = 0; layout < 4; ++layout) {
          ++n;
          if (quick && n % 7 != 0) continue;
          layer_case c;
          c.act = act;
          c.format = format;
          c.input = input;
          c.source = n % 3 == 0 ? dtypes[n / 3 % 3] : format;
          c.interleaved = layout & 1;
          c.transposed = layout & 2;
          c.bias = n % 2;
          c.routing = dtypes[n / 2 % 3];
          c.ids = n % 5 == 0 ? kt::id_type::i32 : kt::id_type::i64;
          c.tokens = tokens[n % 4];
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
          for (dtype format : dtypes) {
            layer_case c;
            c.hidden = hidden;
            c.intermediate = intermediate;
            c.experts = experts;
            c.top_k = std::min(experts, 3);
            c.tokens = tokens;
            c.source = c.format = format;
            c.input = dtypes[(n + tokens) % 3];
            c.interleaved = n % 2;
            c.act.gated = n % 3 != 0;
            c.bias = true;
            run_case(c, ++n);
          }
        }
}

void test_token_counts() {
  unsigned n = 2000;
  for (std::size_t tokens : {0, 1, 2, 7, 13, 64, 300})
    for (dtype format : dtypes)
      for (dtype input : dtypes) {
        if (quick && (tokens > 13 || format != input)) continue;
        if (tokens == 300 && format != input && input != dtype::f32) continue;
        layer_case c;
        c.tokens = tokens;
        c.source = c.format = format;
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
                      const std::string& label, std::ptrdiff_t skip = -1) {
  const std::size_t row = l.c.hidden * size_of(l.c.input);
  for (std::size_t t = 0; t < l.c.tokens; ++t) {
    if (static_cast<std::ptrdiff_t>(t) == skip) continue;
    const outcome alone = run(threads(t % 2 ? 5 : 1), e, *i.kernels, single_row(l, t));
    const std::ptrdiff_t at = first_difference(alone.rows.data(), batch.rows.data() + t * row, l.c.hidden, l.c.input);
    if (!check(at < 0, label + ": row " + std::to_string(t) + " alone has other bits at " + std::to_string(at))) return;
  }
}

void test_rows_do_not_depend_on_the_batch() {
  for (std::size_t tokens : {2, 13, 300})
    for (dtype type : dtypes)
      for (const kt::isa* i : isas) {
        if (!has_kernels(*i, type, type) || (quick && tokens > 13)) continue;
        layer_case c;
        c.tokens = tokens;
        c.source = c.format = c.input = type;
        layer l(c, 3000 + static_cast<unsigned>(tokens));
        const kt::experts e = l.pack();
        const std::string label = describe(c) + " [" + i->name + "]";
        check_rows_alone(l, e, *i, checked_run(2, *i, e, l, label), label);
      }
}

// A row of NaN and one of infinities stay among themselves, and every instruction set makes the same of them.
void test_rows_that_are_no_numbers() {
  for (dtype type : dtypes) {
    layer_case c;
    c.tokens = 13;
    c.source = c.format = c.input = type;
    layer l(c, 4000);
    for (std::size_t k = 0; k < c.hidden; ++k) l.hidden.set(5 * l.hidden_stride() + k, k % 2 ? INFINITY : -INFINITY);
    l.hidden.set(9 * l.hidden_stride() + 3, NAN);
    const kt::experts e = l.pack();
    outcome first;
    for (const kt::isa* i : isas) {
      if (!has_kernels(*i, type, type)) continue;
      const std::string label = describe(c) + " with NaN rows [" + i->name + "]";
      const outcome o = checked_run(2, *i, e, l, label);
      if (first.rows.empty()) first = o;
      same(first, o, type, label);
      check_rows_alone(l, e, *i, o, label);
      check(is_nan(o.rows.data() + 9 * c.hidden * size_of(type), type), label + ": a NaN got lost");
    }
  }
}

void test_ids_and_weights() {
  layer_case c;
  c.tokens = 4;
  c.input = dtype::f32;
  c.source = c.format = dtype::f32;
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
  c.source = c.format = c.input = dtype::f32;
  const kt::isa& i = *isas.front();
  const kt::isa& isa = has_kernels(i, c.format, c.input) || isas.size() < 2 ? i : *isas[1];
  if (std::string(isa.name) == "scalar") return;
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
  const kt::kernel_table& kernels = *isas.back()->kernels;
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
    {"shapes", test_shapes},
    {"token counts", test_token_counts},
    {"rows alone", test_rows_do_not_depend_on_the_batch},
    {"rows that are no numbers", test_rows_that_are_no_numbers},
    {"ids and weights", test_ids_and_weights},
    {"long input", test_long_input},
    {"several callers", test_calls_from_several_threads},
};
