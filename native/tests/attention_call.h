// Random queries, keys and values, calls of attention with them, and its definition in double.
#pragma once
#include <kt/context.h>
#include <kt/isa.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "weights.h"

struct attention_case {
  int sequences = 2, heads = 4, kv_heads = 2;
  std::int64_t queries = 5, positions = 70;
  std::size_t key_size = 16, value_size = 16;
  kt::dtype type = kt::dtype::f32;
  bool causal = true, sinks = false;
  std::int64_t window = 0;
  float softcap = 0;
};

inline std::string describe(const attention_case& c) {
  std::string s = "attention of " + std::to_string(c.sequences) + " sequences, heads " + std::to_string(c.heads) + "/" +
                  std::to_string(c.kv_heads) + ", queries " + std::to_string(c.queries) + "/" +
                  std::to_string(c.positions) + ", sizes " + std::to_string(c.key_size) + "/" +
                  std::to_string(c.value_size) + ", " + name_of(c.type);
  if (c.window) s += ", window " + std::to_string(c.window);
  if (c.softcap > 0) s += ", softcap";
  return s + (c.causal ? ", causal" : "") + (c.sinks ? ", sinks" : "");
}

// Queries, keys and values as [sequence][head][position][size + gap], NaN in the gaps.
constexpr std::size_t gap = 3;

class attention_call {
  std::mt19937 random_;

  elements fill(int heads, std::int64_t positions, std::size_t size) {
    std::uniform_real_distribution<double> uniform(-1.7, 1.7);
    elements e(c.type, c.sequences * heads * positions * (size + gap));
    for (std::size_t i = 0; i < e.size(); ++i) e.set(i, i % (size + gap) < size ? uniform(random_) : NAN);
    return e;
  }

 public:
  attention_case c;
  elements query, key, value;
  std::vector<float> sinks;

  attention_call(const attention_case& k, unsigned seed)
      : random_(seed),
        c(k),
        query(fill(c.heads, c.queries, c.key_size)),
        key(fill(c.kv_heads, c.positions, c.key_size)),
        value(fill(c.kv_heads, c.positions, c.value_size)),
        sinks(c.heads, 1.5f) {}

  static kt::attention_strides strides(int heads, std::int64_t positions, std::size_t size) {
    const auto row = static_cast<std::ptrdiff_t>(size + gap);
    return {heads * positions * row, positions * row, row};
  }

  kt::attention_arguments arguments(elements& out) {
    kt::attention_arguments a;
    a.sequences = c.sequences;
    a.query_heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.key_size = c.key_size;
    a.value_size = c.value_size;
    a.type = a.kv_type = c.type;
    a.query = {query.bytes.data(), strides(c.heads, c.queries, c.key_size)};
    a.key = {key.bytes.data(), strides(c.kv_heads, c.positions, c.key_size)};
    a.value = {value.bytes.data(), strides(c.kv_heads, c.positions, c.value_size)};
    a.out = out.bytes.data();
    a.out_strides = strides(c.heads, c.queries, c.value_size);
    a.queries = c.queries;
    a.positions = c.positions;
    a.causal = c.causal;
    a.window = c.window;
    a.sinks = c.sinks ? sinks.data() : nullptr;
    a.scale = 0.3f;
    a.softcap = c.softcap;
    return a;
  }

  elements empty() const {
    elements out(c.type, c.sequences * c.heads * c.queries * (c.value_size + gap));
    for (std::size_t i = 0; i < out.size(); ++i) out.set(i, NAN);
    return out;
  }

  elements run(int n, const kt::isa& isa) {
    elements out = empty();
    threads(n).attention(*isa.kernels, arguments(out));
    return out;
  }

  // Each query by a call of its own.
  elements run_one_by_one(int n, const kt::isa& isa) {
    elements out = empty();
    for (std::int64_t q = 0; q < c.queries; ++q) {
      kt::attention_arguments a = arguments(out);
      a.query.data = query.bytes.data() + q * (c.key_size + gap) * size_of(c.type);
      a.out = out.bytes.data() + q * (c.value_size + gap) * size_of(c.type);
      a.queries = 1;
      a.first = c.positions - c.queries + q;
      threads(n).attention(*isa.kernels, a);
    }
    return out;
  }

  // Positions in blocks of `size`, the last block first, NaN where there is no position.
  elements run_in_blocks(int n, const kt::isa& isa, std::int64_t size) {
    const std::int64_t width = (c.positions + size - 1) / size, blocks = c.sequences * width;
    std::vector<std::int32_t> table(blocks);
    for (std::int64_t i = 0; i < blocks; ++i) table[i] = static_cast<std::int32_t>(blocks - 1 - i);
    const auto place = [&](const elements& from, std::size_t columns) {
      elements to(c.type, blocks * size * c.kv_heads * columns);
      for (std::size_t i = 0; i < to.size(); ++i) to.set(i, NAN);
      const std::size_t element = size_of(c.type);
      for (int s = 0; s < c.sequences; ++s)
        for (int h = 0; h < c.kv_heads; ++h)
          for (std::int64_t p = 0; p < c.positions; ++p) {
            const std::size_t block = table[s * width + p / size];
            const std::size_t source = ((s * c.kv_heads + h) * c.positions + p) * (columns + gap);
            std::memcpy(to.bytes.data() + ((block * size + p % size) * c.kv_heads + h) * columns * element,
                        from.bytes.data() + source * element, columns * element);
          }
      return to;
    };
    const elements keys = place(key, c.key_size), values = place(value, c.value_size);
    const auto block_strides = [&](std::size_t columns) {
      const auto one = static_cast<std::ptrdiff_t>(columns);
      return kt::attention_strides{size * c.kv_heads * one, one, c.kv_heads * one};
    };
    elements out = empty();
    kt::attention_arguments a = arguments(out);
    a.key = {keys.bytes.data(), block_strides(c.key_size)};
    a.value = {values.bytes.data(), block_strides(c.value_size)};
    a.block_table = table.data();
    a.table_stride = width;
    a.block_size = size;
    threads(n).attention(*isa.kernels, a);
    return out;
  }

  // Of each column the result, and the mean distance of what is summed up from it.
  struct expected {
    double value, spread;
  };

  std::vector<expected> row(int s, int h, std::int64_t q) const {
    const int kv = h / (c.heads / c.kv_heads);
    const std::int64_t place = c.positions - c.queries + q, end = c.causal ? place + 1 : c.positions;
    const std::int64_t begin = c.window ? std::max<std::int64_t>(0, end - c.window) : 0;
    double total = c.sinks ? std::exp(static_cast<double>(sinks[h])) : 0;
    const double sink = total;
    std::vector<double> weights;
    for (std::int64_t p = begin; p < end; ++p) {
      double score = 0;
      for (std::size_t i = 0; i < c.key_size; ++i)
        score += query.get(((s * c.heads + h) * c.queries + q) * (c.key_size + gap) + i) *
                 key.get(((s * c.kv_heads + kv) * c.positions + p) * (c.key_size + gap) + i);
      score *= 0.3f;
      if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
      weights.push_back(std::exp(score));
      total += weights.back();
    }
    std::vector<expected> all(c.value_size);
    for (std::size_t column = 0; column < c.value_size; ++column) {
      const auto at = [&](std::int64_t p) {
        return value.get(((s * c.kv_heads + kv) * c.positions + p) * (c.value_size + gap) + column);
      };
      double sum = 0;
      for (std::int64_t p = begin; p < end; ++p) sum += weights[p - begin] / total * at(p);
      double spread = sink / total * std::fabs(sum);
      for (std::int64_t p = begin; p < end; ++p) spread += weights[p - begin] / total * std::fabs(at(p) - sum);
      all[column] = {sum, spread};
    }
    return all;
  }
};
