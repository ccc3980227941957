// Attention against its definition in double, and bit for bit over instruction sets, threads and storage in blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>

#include "attention_call.h"

#define KT_UNROLLED(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)

namespace lanes8 {
struct vec {
  static constexpr int lanes = 8;
};
#include "../kernels/transpose.inl"
}  // namespace lanes8

namespace lanes16 {
struct vec {
  static constexpr int lanes = 16;
};
#include "../kernels/transpose.inl"
}  // namespace lanes16

namespace {

using kt::dtype;

// Whether both products are summed on tiles (kt/attention.h).
bool on_tiles(const kt::isa& isa, dtype type) { return type == dtype::bf16 && isa.kernels->tiles; }

// Keys or values as codes of int8 with scales, -128 and NaN in the gaps; the numbers that they are go to `numbers`.
struct stored_rows {
  std::vector<std::int8_t> codes;
  std::vector<float> scales;
  std::size_t size, group;

  stored_rows(elements& numbers, std::size_t row_size, std::size_t row_group, unsigned seed)
      : codes(numbers.size(), -128),
        scales(numbers.size() / (row_size + gap) * (row_size / row_group + gap), NAN),
        size(row_size),
        group(row_group) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> code(-127, 127);
    std::uniform_real_distribution<float> scale(0.001f, 0.01f);
    for (std::size_t row = 0; row < numbers.size() / (size + gap); ++row)
      for (std::size_t i = 0; i < size; ++i) {
        float& s = scales[row * (size / group + gap) + i / group];
        if (i % group == 0) s = scale(random);
        codes[row * (size + gap) + i] = static_cast<std::int8_t>(code(random));
        numbers.set(row * (size + gap) + i, codes[row * (size + gap) + i] * s);
      }
  }

  void use(kt::attention_place& place, kt::attention_scales& s, int heads, std::int64_t positions) const {
    place = {codes.data(), attention_call::strides(heads, positions, size)};
    s = {{scales.data(), attention_call::strides(heads, positions, size / group)}, group};
  }
};

// Weights p (1 + d) instead of p, |d| <= u, move sum p x / sum p by (sum p d (x - result)) / (sum p (1 + d)): by
// u / (1 - u) of the mean distance at most.
void compare(const attention_call& call, const elements& got, const std::string& label) {
  const attention_case& c = call.c;
  const double u = c.type == dtype::bf16 ? floats::unit(dtype::bf16) : 0;
  double worst = 0;
  bool gaps_kept = true;
  std::size_t i = 0;
  for (int s = 0; s < c.sequences; ++s)
    for (int h = 0; h < c.heads; ++h)
      for (std::int64_t q = 0; q < c.queries; ++q) {
        for (const attention_call::expected& wanted : call.row(s, h, q)) {
          const double moved = u / (1 - u) * wanted.spread;
          const double rounding = (std::fabs(wanted.value) + moved) * floats::unit(c.type);
          const double error = std::fabs(got.get(i++) - wanted.value) - moved - rounding;
          worst = error <= worst ? worst : error;  // NaN stays
        }
        for (std::size_t k = 0; k < gap; ++k, ++i) gaps_kept &= std::isnan(got.get(i));
      }
  check(worst < 3e-6, label + ": off by " + std::to_string(worst));
  check(gaps_kept, label + ": gaps between rows of the result");
}

std::vector<attention_case> attention_cases() {
  std::vector<attention_case> cases;
  for (dtype type : dtypes) {
    attention_case c;
    c.type = type;
    cases.push_back(c);
    c.key_size = 9, c.value_size = 37, c.window = 20, c.sinks = true;
    cases.push_back(c);
    c.positions = 300, c.queries = 1, c.softcap = 4, c.window = 0;
    cases.push_back(c);
    c.positions = c.queries = 67, c.heads = 3, c.kv_heads = 1, c.softcap = 0;
    cases.push_back(c);
    c.causal = false, c.positions = 129, c.heads = 1;
    cases.push_back(c);
  }
  // Tiles: whole ones and parts of them, of rows, dimensions, positions and columns.
  attention_case c;
  c.type = dtype::bf16, c.sequences = 1, c.heads = c.kv_heads = 1;
  struct sizes {
    std::int64_t queries, positions;
    std::size_t key, value;
  };
  for (const sizes& z : {sizes{257, 257, 33, 17}, {64, 320, 128, 64}, {1, 65, 192, 128}, {17, 96, 576, 512}}) {
    c.queries = z.queries, c.positions = z.positions, c.key_size = z.key, c.value_size = z.value;
    cases.push_back(c);
    c.heads = 3, c.window = 75;
    if (!quick) cases.push_back(c);
    c.heads = 1, c.window = 0;
  }
  return cases;
}

void test_attention() {
  unsigned n = 20'000;
  for (const attention_case& c : attention_cases()) {
    attention_call call(c, ++n);
    std::vector<elements> wanted[2];  // as all others have it, and as AMX
    for (const kt::isa* i : isas) {
      const std::string label = describe(c) + " [" + i->name + "]";
      std::vector<elements>& first = wanted[on_tiles(*i, c.type)];
      if (first.empty()) {
        first.push_back(call.run(1, *i));
        compare(call, first[0], label);
      }
      const std::vector<char>& bytes = first[0].bytes;
      check(call.run(1, *i).bytes == bytes, label);
      check(call.run(3, *i).bytes == bytes, label + " on 3 threads");
      for (std::int64_t size : {16, 48})
        check(call.run_in_blocks(2, *i, size).bytes == bytes, label + " in blocks of " + std::to_string(size));
      if (c.causal) check(call.run_one_by_one(2, *i).bytes == bytes, label + " one by one");
    }
  }
}

// What values are weighted with and what the result is divided by are the same numbers. All weights but the first are
// 0.5019, and 0.5 in bf16: to divide by the former would take four thousandths from the result.
void test_attention_over_one_value() {
  constexpr double value = 255.0 / 128, key[] = {-147.0 / 64, -0x1.a4p-11};
  for (dtype type : dtypes) {
    attention_case c;
    c.type = type, c.positions = 150, c.key_size = c.value_size = 40, c.causal = false;
    attention_call call(c, 35'000);
    const auto set = [](elements& e, std::size_t size, auto at) {
      for (std::size_t i = 0; i < e.size(); ++i)
        if (i % (size + gap) < size) e.set(i, at(i / (size + gap), i % (size + gap)));
    };
    set(call.query, c.key_size, [](std::size_t, std::size_t i) { return 1.0 * (i < 2); });
    set(call.key, c.key_size, [&](std::size_t row, std::size_t i) {
      return i < 2 && row % static_cast<std::size_t>(c.positions) ? key[i] : 0.0;
    });
    set(call.value, c.value_size, [](std::size_t, std::size_t) { return value; });
    for (const kt::isa* i : isas) {
      const elements got = call.run(2, *i);
      double worst = 0;
      for (std::size_t k = 0; k < got.size(); ++k)
        if (k % (c.value_size + gap) < c.value_size) worst = std::max(worst, std::fabs(got.get(k) - value));
      check(worst <= (type == dtype::f32 ? 1e-6 : 0), describe(c) + " over one value [" + i->name + "]");
    }
  }
}

// The kernels themselves, as the results of a call are rounded: values of many sizes have the same sums by products of
// all and position by position.
void test_attention_one_by_one() {
  constexpr int rows = 37, count = 61;
  constexpr std::size_t key_size = 48, columns = 37, width = 64;
  std::mt19937 random(37'000);
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::uniform_int_distribution<int> exponent(-9, 9);
  elements keys(dtype::bf16, count * key_size), values(dtype::bf16, count * columns),
      queries(dtype::bf16, rows * key_size);
  for (std::size_t i = 0; i < keys.size(); ++i) keys.set(i, uniform(random));
  for (std::size_t i = 0; i < queries.size(); ++i) queries.set(i, uniform(random));
  for (std::size_t i = 0; i < values.size(); ++i) values.set(i, std::ldexp(uniform(random), exponent(random)));
  const auto addresses = [](const elements& e, int n) {
    std::vector<const void*> all;
    for (int i = 0; i < n; ++i) all.push_back(e.bytes.data() + e.bytes.size() / n * i);
    return all;
  };
  std::vector<std::int32_t> begin(rows), end(rows);
  const std::vector<const void*> masks(rows);
  for (int r = 0; r < rows; ++r) begin[r] = r / 2, end[r] = std::min(count, 20 + 2 * r);
  for (const kt::isa* i : isas)
    for (const kt::attention_kernels* k : {&i->kernels->attention, &i->kernels->attention_bf16}) {
      const kernel_mode mode;
      const std::size_t size = (key_size + k->key_unit - 1) / k->key_unit * k->key_unit;
      struct alignas(64) line {
        char bytes[64];
      };
      const auto room = [](std::size_t bytes) { return std::vector<line>((bytes + 63) / 64); };
      std::vector<line> packed_keys = room(64 * size * k->bytes), packed_values = room(64 * width * k->bytes);
      std::vector<line> packed_queries = room(rows * size * k->bytes), scores = room(rows * 64 * sizeof(float));
      k->unpack_rows({addresses(queries, rows).data(), rows, dtype::bf16, key_size, size, packed_queries.data()});
      k->pack_keys({addresses(keys, count).data(), count, dtype::bf16, key_size, packed_keys.data(), nullptr, 0});
      k->pack_values({addresses(values, count).data(), count, dtype::bf16, columns, packed_values.data(), nullptr, 0});
      std::vector<float> out[2];
      for (bool finite : {false, true}) {
        std::vector<float> max(rows, 1.0f), sums(rows * kt::attention_sums, 1.0f);
        out[finite].assign(rows * width, 0.3f);
        k->attend({packed_queries.data(),
                   size,
                   rows,
                   packed_keys.data(),
                   packed_values.data(),
                   columns,
                   finite,
                   begin.data(),
                   end.data(),
                   kt::mask_type::none,
                   masks.data(),
                   count,
                   1.0f,
                   0.0f,
                   reinterpret_cast<float*>(scores.data()),
                   {max.data(), sums.data(), out[finite].data(), width},
                   {}});
      }
      bool same = true;
      for (std::size_t at = 0; at < rows * width; ++at) same &= at % width >= columns || out[0][at] == out[1][at];
      check(same, std::string("attention one by one [") + i->name + "]");
    }
}

// A row gets the same bits whether it is multiplied on tiles, or position by position as where some value is not
// finite.
void test_attention_beside_infinity() {
  for (dtype type : dtypes) {
    attention_case c;
    c.type = type, c.queries = c.positions = 150, c.key_size = 16, c.value_size = 37;
    attention_call call(c, 36'000);
    for (const kt::isa* i : isas) {
      const elements before = call.run(2, *i);
      attention_call with(call);
      for (int row = 0; row < c.sequences * c.kv_heads; ++row)  // seen from query 100 on
        with.value.set((row * c.positions + 100) * (c.value_size + gap) + 5, INFINITY);
      const elements after = with.run(2, *i);
      bool same = true, infinite = true;
      for (std::size_t k = 0; k < after.size(); ++k) {
        const std::size_t column = k % (c.value_size + gap), query = k / (c.value_size + gap) % c.queries;
        if (column >= c.value_size) continue;
        if (query >= 100 && column == 5)
          infinite &= std::isinf(after.get(k));
        else
          same &= after.get(k) == before.get(k);
      }
      check(same && infinite, describe(c) + " beside infinity [" + i->name + "]");
    }
  }
}

void test_attention_over_codes() {
  unsigned n = 30'000;
  struct sizes {
    std::size_t key, key_group, value, value_group;
  };
  const sizes all[] = {{16, 16, 16, 16}, {9, 9, 37, 37}, {6, 6, 3, 3}, {128, 64, 128, 32}, {80, 16, 48, 48}};
  for (const sizes& z : all) {
    attention_case c;
    c.key_size = z.key, c.value_size = z.value, c.positions = 150, c.window = 100, c.sinks = true;
    attention_call call(c, ++n);
    const stored_rows keys(call.key, z.key, z.key_group, ++n), values(call.value, z.value, z.value_group, ++n);
    const elements wanted = call.run(1, *isas.front());
    const std::string label = describe(c) + " over codes";
    compare(call, wanted, label);
    const std::int32_t table[] = {0, 1};
    for (const kt::isa* i : isas)
      for (int count : {1, 3})
        for (bool in_blocks : {false, true}) {
          elements out = call.empty();
          kt::attention_arguments a = call.arguments(out);
          keys.use(a.key, a.key_scales, c.kv_heads, c.positions);
          values.use(a.value, a.value_scales, c.kv_heads, c.positions);
          if (in_blocks) a.block_table = table, a.table_stride = 1, a.block_size = c.positions;
          threads(count).attention(*i->kernels, a);
          check(out.bytes == wanted.bytes, label + " [" + i->name + "]" + (in_blocks ? " in blocks" : ""));
        }
  }
}

// Two tokens in the slots 5 and 2 of blocks of three; a third has none.
void test_store_kv() {
  constexpr std::size_t tokens = 3, heads = 2, slots = 6;
  const std::int64_t slot[tokens] = {5, -1, 2};
  for (std::size_t group : {16, 9})
    for (std::size_t size : {group, 2 * group}) {
      std::mt19937 random(7);
      std::uniform_real_distribution<float> uniform(-2, 2);
      std::vector<float> rows(tokens * heads * (size + gap), NAN);
      for (std::size_t i = 0; i < rows.size(); ++i)
        if (i % (size + gap) < size) rows[i] = uniform(random);
      for (const kt::isa* i : isas) {
        std::vector<std::int8_t> codes(slots * heads * (size + gap), -128);
        std::vector<float> scales(slots * heads * (size / group + gap), NAN);
        const auto strides = [](std::size_t row) {
          const auto one = static_cast<std::ptrdiff_t>(row + gap), position = static_cast<std::ptrdiff_t>(heads) * one;
          return kt::attention_strides{3 * position, one, position};
        };
        kt::store_kv_arguments a;
        a.tokens = tokens, a.heads = heads, a.size = size, a.group = group;
        a.rows = rows.data();
        a.token_stride = heads * (size + gap), a.head_stride = size + gap;
        a.slots = slot, a.block_size = 3;
        a.codes = codes.data(), a.code_strides = strides(size);
        a.scales = scales.data(), a.scale_strides = strides(size / group);
        threads(2).store_kv(*i->kernels, a);
        bool right = true, gaps_kept = true;
        for (std::size_t at = 0; at < codes.size(); ++at) {
          const std::size_t column = at % (size + gap), row = at / (size + gap);
          const std::size_t token = row / heads == 5 ? 0 : row / heads == 2 ? 2 : 1;
          if (token == 1 || column >= size) {
            gaps_kept &= codes[at] == -128;
            continue;
          }
          const float scale = scales[row * (size / group + gap) + column / group];
          const float x = rows[(token * heads + row % heads) * (size + gap) + column];
          right &= std::fabs(codes[at] * scale - x) <= 0.5001f * scale;
        }
        for (std::size_t at = 0; at < scales.size(); ++at) {
          const std::size_t row = at / (size / group + gap);
          const bool there = at % (size / group + gap) < size / group && (row / heads == 5 || row / heads == 2);
          gaps_kept &= std::isnan(scales[at]) != there;
        }
        const std::string label = "rows of " + std::to_string(size) + " stored [" + i->name + "]";
        check(right, label);
        check(gaps_kept, label + ": other memory");
      }
    }
}

template <int lanes, class F>
bool transposes(F transpose) {
  float numbers[lanes][lanes];
  for (int i = 0; i < lanes * lanes; ++i) numbers[i / lanes][i % lanes] = static_cast<float>(i);
  transpose(numbers);
  bool right = true;
  for (int i = 0; i < lanes * lanes; ++i) right &= numbers[i % lanes][i / lanes] == static_cast<float>(i);
  return right;
}

// The shuffles of the widest vectors too, which not every CPU has.
void test_transposition() {
  const auto with = [](auto& numbers, auto rows, auto transpose) {
    std::memcpy(&rows, numbers, sizeof rows);
    transpose(rows);
    std::memcpy(numbers, &rows, sizeof rows);
  };
  typedef float row8 __attribute__((vector_size(32)));
  typedef float row16 __attribute__((vector_size(64)));
  struct rows8 {
    row8 at[8];
  };
  struct rows16 {
    row16 at[16];
  };
  check(transposes<8>([&](auto& x) { with(x, rows8{}, [](rows8& r) { lanes8::transpose(r.at); }); }), "eight lanes");
  check(transposes<16>([&](auto& x) { with(x, rows16{}, [](rows16& r) { lanes16::transpose(r.at); }); }),
        "sixteen lanes");
}

}  // namespace

const std::vector<test> attention_tests = {
    {"attention", test_attention},
    {"attention over one value", test_attention_over_one_value},
    {"attention one by one", test_attention_one_by_one},
    {"attention beside infinity", test_attention_beside_infinity},
    {"attention over codes", test_attention_over_codes},
    {"stored keys and values", test_store_kv},
    {"transposition", test_transposition},
};
