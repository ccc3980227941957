// Steps of programs around attention: rotary embeddings, keys and values in blocks, attention itself.
#include <cmath>
#include <cstring>

#include "program_call.h"

namespace kt {

void program::call::compute_rotary(const step& s) {
  array x = in(s, 0), cos = in(s, 1), sin = in(s, 2);
  if (x.rank != 4 || cos.rank != 3 || sin.rank != 3 || cos.type != x.type || sin.type != x.type)
    fail_program("heads and angles do not fit");
  if (x.strides[3] != 1) x = dense(s, x);
  cos = dense(s, cos);
  sin = dense(s, sin);
  const std::int64_t rotated = cos.shape[2];
  if (cos.shape[1] != x.shape[2] || (cos.shape[0] != 1 && cos.shape[0] != x.shape[0]) || rotated > x.shape[3] ||
      rotated % 2 || sin.count() != cos.count())
    fail_program("heads and angles do not fit");
  const std::int64_t shape[] = {x.shape[0], x.shape[2], x.shape[1], x.shape[3]};
  array& b = place(s, 0, x.type, shape, 4);
  rotary_job job{};
  job.in = x.data;
  job.out = b.data;
  const std::int64_t* from[] = {x.strides, b.strides};
  job.in_strides[0] = x.strides[0], job.in_strides[1] = x.strides[2], job.in_strides[2] = x.strides[1];
  std::copy(from[1], from[1] + 3, job.out_strides);
  job.positions = static_cast<std::size_t>(x.shape[2]);
  job.heads = static_cast<std::size_t>(x.shape[1]);
  job.type = float_type(x);
  job.size = static_cast<std::size_t>(x.shape[3]);
  job.rotated = static_cast<std::size_t>(rotated);
  job.cos = cos.data;
  job.sin = sin.data;
  job.angle_strides[0] = cos.shape[0] == 1 ? 0 : cos.strides[0];
  job.angle_strides[1] = cos.strides[1];
  if (s.in.size() > 3) {
    const array weight = dense(s, in(s, 3));
    if (weight.count() != x.shape[3]) fail_program("a norm of heads has another size");
    job.norm = {weight.data, float_type(weight), static_cast<float>(real_number_of(s, 1)),
                static_cast<float>(real_number_of(s, 0)), number(s, 0) != 0};
  }
  c.rotary(k, job, static_cast<std::size_t>(x.count() / std::max<std::int64_t>(1, x.shape[3])));
  std::swap(b.shape[1], b.shape[2]);
  std::swap(b.strides[1], b.strides[2]);
}

void program::call::compute_attention(const step& s) {
  array q = in(s, 0), key = in(s, 1), value = in(s, 2);
  if (q.rank != 4 || key.rank != 4 || value.rank != 4) fail_program("attention has other dimensions");
  for (array* a : {&q, &key, &value})
    if (a->strides[3] != 1 && a->shape[3] != 1) *a = dense(s, *a);
  if (key.shape[1] == 0 || q.shape[1] % key.shape[1] || q.shape[3] != key.shape[3] || key.shape[2] != value.shape[2] ||
      key.shape[0] != q.shape[0] || key.type != value.type)
    fail_program("queries, keys and values do not fit");
  const std::int64_t shape[] = {q.shape[0], q.shape[2], q.shape[1], value.shape[3]};
  array& b = place(s, 0, q.type, shape, 4);
  std::swap(b.shape[1], b.shape[2]);
  std::swap(b.strides[1], b.strides[2]);
  const auto place_of = [](const array& a) {
    return attention_place{a.data, {a.strides[0], a.strides[1], a.strides[2]}};
  };
  attention_arguments a;
  a.sequences = static_cast<int>(q.shape[0]);
  a.query_heads = static_cast<int>(q.shape[1]);
  a.kv_heads = static_cast<int>(key.shape[1]);
  a.key_size = static_cast<std::size_t>(key.shape[3]);
  a.value_size = static_cast<std::size_t>(value.shape[3]);
  a.type = float_type(q);
  a.kv_type = float_type(key);
  a.query = place_of(q);
  a.key = place_of(key);
  a.value = place_of(value);
  a.out = b.data;
  a.out_strides = {b.strides[0], b.strides[1], b.strides[2]};
  a.queries = q.shape[2];
  a.positions = key.shape[2];
  a.block_size = 1;
  a.causal = number(s, 0) != 0;
  a.first = number(s, 1);
  a.window = number(s, 2);
  std::size_t next = 3;
  if (number(s, 3) & 1) {
    array mask = in(s, next++);
    array whole = q;
    whole.shape[3] = key.shape[2];
    if (mask.rank > 4) fail_program("a mask has more dimensions");
    if (mask.rank && mask.strides[mask.rank - 1] != 1) mask = dense(s, mask);
    array m = whole;
    for (int i = 0; i < 4; ++i) {
      const int from = i - (4 - mask.rank);
      if (from >= 0 && mask.shape[from] != 1 && mask.shape[from] != whole.shape[i]) fail_program("a mask does not fit");
      m.strides[i] = from < 0 || mask.shape[from] == 1 ? 0 : mask.strides[from];
    }
    if (whole.shape[3] != 1 && m.strides[3] != 1) fail_program("a mask has not all keys");
    a.mask = {mask.data, {m.strides[0], m.strides[1], m.strides[2]}};
    a.mask_kind = mask.type == element::boolean ? mask_type::boolean
                  : mask.type == element::f32   ? mask_type::f32
                  : mask.type == element::f16   ? mask_type::f16
                                                : mask_type::bf16;
  }
  if (number(s, 3) & 2) {
    const array sinks = dense(s, in(s, next));
    if (sinks.type != element::f32 || sinks.count() != q.shape[1]) fail_program("sinks do not fit");
    a.sinks = reinterpret_cast<const float*>(sinks.data);
  }
  const double scale = real_number_of(s, 0);
  a.scale = static_cast<float>(scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(a.key_size)));
  a.softcap = static_cast<float>(real_number_of(s, 1));
  c.attention(k, a);
}

// Rows [1, heads, tokens, size] into slots of blocks [blocks, positions, heads, size].
void program::call::store_rows(const array& rows, const array& slots, const array& blocks, const array* scales) {
  const auto* slot = reinterpret_cast<const std::int64_t*>(slots.data);
  const std::int64_t heads = rows.shape[1], tokens = rows.shape[2], size = rows.shape[3], positions = blocks.shape[1];
  for (std::int64_t t = 0; t < tokens; ++t)
    if (slot[t] >= blocks.shape[0] * positions)
      fail_program("slot " + std::to_string(slot[t]) + " is not in the storage");
  if (scales) {
    store_kv_arguments a;
    a.tokens = static_cast<std::size_t>(tokens);
    a.heads = static_cast<std::size_t>(heads);
    a.size = static_cast<std::size_t>(size);
    a.rows = rows.data;
    a.type = float_type(rows);
    a.token_stride = rows.strides[2];
    a.head_stride = rows.strides[1];
    a.slots = slot;
    a.block_size = positions;
    a.codes = reinterpret_cast<std::int8_t*>(blocks.data);
    a.code_strides = {blocks.strides[0], blocks.strides[2], blocks.strides[1]};
    a.scales = reinterpret_cast<float*>(scales->data);
    a.scale_strides = {scales->strides[0], scales->strides[2], scales->strides[1]};
    a.group = static_cast<std::size_t>(size / scales->shape[3]);
    return c.store_kv(k, a);
  }
  const auto bytes = static_cast<std::int64_t>(size_of(blocks.type));
  c.each_row(static_cast<std::size_t>(tokens), static_cast<std::size_t>(heads * size),
             [&](std::size_t begin, std::size_t end) {
               for (std::size_t t = begin; t < end; ++t) {
                 if (slot[t] < 0) continue;
                 const char* from = rows.data + static_cast<std::int64_t>(t) * rows.strides[2] * bytes;
                 char* to = blocks.data +
                            (slot[t] / positions * blocks.strides[0] + slot[t] % positions * blocks.strides[1]) * bytes;
                 for (std::int64_t h = 0; h < heads; ++h)
                   std::memcpy(to + h * blocks.strides[2] * bytes, from + h * rows.strides[1] * bytes,
                               static_cast<std::size_t>(size * bytes));
               }
             });
}

void program::call::compute_cached_attention(const step& s) {
  const bool coded = number(s, 1) & 1, with_sinks = number(s, 1) & 2, with_value = number(s, 1) & 4;
  std::size_t next = 0;
  const array key_blocks = in(s, next++), value_blocks = in(s, next++);
  const array key_scales = coded ? in(s, next++) : array{}, value_scales = coded ? in(s, next++) : array{};
  array q = in(s, next++), key = in(s, next++), value = with_value ? in(s, next++) : key;
  const array slots = dense(s, in(s, next++)), table = dense(s, in(s, next++)), lengths = dense(s, in(s, next++)),
              starts = dense(s, in(s, next++));
  for (array* a : {&q, &key, &value}) {
    if (a->rank != 4 || a->shape[0] != 1) fail_program("tokens of a step are not one row");
    if (a->strides[3] != 1 && a->shape[3] != 1) *a = dense(s, *a);
  }
  const auto holds = [&](const array& blocks, const array& scales, const array& rows) {
    return blocks.rank == 4 && blocks.shape[1] > 0 && blocks.strides[3] == 1 && blocks.shape[2] == rows.shape[1] &&
           blocks.shape[3] == rows.shape[3] && rows.shape[2] == q.shape[2] &&
           (coded ? blocks.type == element::i8 && scales.type == element::f32 && scales.rank == 4 &&
                        scales.shape[3] > 0 && blocks.shape[3] % scales.shape[3] == 0 && scales.strides[3] == 1 &&
                        std::equal(scales.shape, scales.shape + 3, blocks.shape)
                  : blocks.type == rows.type);
  };
  if (!with_value) {  // the first elements of keys are the values
    if (value_blocks.data != key_blocks.data || value_blocks.rank != 4 || value_blocks.shape[3] > key.shape[3] ||
        !std::equal(value_blocks.strides, value_blocks.strides + 3, key_blocks.strides))
      fail_program("blocks of values are no part of those of keys");
    value.shape[3] = value_blocks.shape[3];
  }
  if (!holds(key_blocks, key_scales, key) || !holds(value_blocks, value_scales, value) ||
      !std::equal(key_blocks.shape, key_blocks.shape + 3, value_blocks.shape))
    fail_program("keys or values do not fit into their storage");
  if (key.shape[1] == 0 || q.shape[1] % key.shape[1] || q.shape[3] != key.shape[3])
    fail_program("queries and keys do not fit");
  if (slots.type != element::i64 || table.type != element::i32 || lengths.type != element::i64 ||
      starts.type != element::i64 || table.rank != 2 || slots.count() != q.shape[2] ||
      lengths.count() != table.shape[0] || starts.count() != table.shape[0] + 1)
    fail_program("what is said of a step's sequences does not fit");
  // Sequences without queries are often many, and at the end.
  const std::int64_t positions = key_blocks.shape[1], blocks = key_blocks.shape[0], tokens = q.shape[2];
  const auto* start = reinterpret_cast<const std::int64_t*>(starts.data);
  const auto* length = reinterpret_cast<const std::int64_t*>(lengths.data);
  const auto* block = reinterpret_cast<const std::int32_t*>(table.data);
  std::int64_t sequences = table.shape[0];
  while (sequences > 0 && start[sequences - 1] == start[sequences]) --sequences;
  if (start[0] != 0 || start[sequences] != tokens) fail_program("queries of a step are those of no sequence");
  for (std::int64_t i = 0; i < sequences; ++i) {
    const std::int64_t queries = start[i + 1] - start[i], used = (length[i] + positions - 1) / positions;
    if (queries < 0 || queries > length[i] || used > table.shape[1])
      fail_program("sequence " + std::to_string(i) + " has a length that cannot be");
    for (std::int64_t j = 0; j < used; ++j)
      if (const std::int32_t b = block[i * table.shape[1] + j]; b < 0 || b >= blocks)
        fail_program("block " + std::to_string(b) + " of " + std::to_string(blocks));
  }
  store_rows(key, slots, key_blocks, coded ? &key_scales : nullptr);
  if (with_value) store_rows(value, slots, value_blocks, coded ? &value_scales : nullptr);
  const std::int64_t shape[] = {1, tokens, q.shape[1], value.shape[3]};
  const array& out = place(s, 0, q.type, shape, 4);
  const auto in_blocks = [](const array& a) {
    return attention_place{a.data, {a.strides[0], a.strides[2], a.strides[1]}};
  };
  attention_arguments a;
  a.sequences = static_cast<int>(sequences);
  a.query_heads = static_cast<int>(q.shape[1]);
  a.kv_heads = static_cast<int>(key.shape[1]);
  a.key_size = static_cast<std::size_t>(key.shape[3]);
  a.value_size = static_cast<std::size_t>(value.shape[3]);
  a.type = float_type(q);
  a.kv_type = coded ? dtype::f32 : float_type(key_blocks);
  a.query = {q.data, {0, q.strides[1], q.strides[2]}};
  a.key = in_blocks(key_blocks);
  a.value = in_blocks(value_blocks);
  if (coded) {
    a.key_scales = {in_blocks(key_scales), static_cast<std::size_t>(key.shape[3] / key_scales.shape[3])};
    a.value_scales = {in_blocks(value_scales), static_cast<std::size_t>(value.shape[3] / value_scales.shape[3])};
  }
  a.out = out.data;
  a.out_strides = {0, out.strides[2], out.strides[1]};
  a.query_starts = start;
  a.lengths = length;
  a.block_table = block;
  a.table_stride = static_cast<std::size_t>(table.shape[1]);
  a.block_size = positions;
  a.causal = true;
  a.window = number(s, 0);
  if (with_sinks) {
    const array sinks = dense(s, in(s, next));
    if (sinks.type != element::f32 || sinks.count() != q.shape[1]) fail_program("sinks do not fit");
    a.sinks = reinterpret_cast<const float*>(sinks.data);
  }
  const double scale = real_number_of(s, 0);
  a.scale = static_cast<float>(scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(a.key_size)));
  a.softcap = static_cast<float>(real_number_of(s, 1));
  c.attention(k, a);
}

}  // namespace kt
