// Softmax attention: a block of work is some rows of one head of keys, an item is a block or one split of it.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "scratch.h"

namespace kt {
namespace {

constexpr std::size_t padded(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// What states of splits may take before they are merged.
constexpr std::int64_t states_bytes = std::int64_t{16} << 20;

// Rows [first, last) of a head of keys of a sequence. Row r is query r / group of head r % group of the group.
struct row_block {
  int sequence, head;
  std::int64_t first, last;
  std::int64_t begin, end;  // positions that any of them sees
  std::int64_t first_split() const { return begin / attention_split; }
  std::int64_t last_split() const { return begin < end ? (end - 1) / attention_split + 1 : first_split(); }
  int rows() const { return static_cast<int>(last - first); }
};

// What a call's arguments mean for each row.
class attention_view {
 public:
  explicit attention_view(const attention_arguments& arguments)
      : a(arguments), group(a.query_heads / a.kv_heads), width(padded(a.value_size, panel_columns)) {}

  std::int64_t queries(int s) const { return a.query_starts ? a.query_starts[s + 1] - a.query_starts[s] : a.queries; }
  std::int64_t length(int s) const { return a.lengths ? a.lengths[s] : a.positions; }
  std::int64_t first_position(int s) const { return a.first >= 0 ? a.first : length(s) - queries(s); }

  std::int64_t end(int s, std::int64_t query) const {
    return a.causal ? std::clamp<std::int64_t>(first_position(s) + query + 1, 0, length(s)) : length(s);
  }
  std::int64_t begin(int s, std::int64_t query) const {
    return a.window > 0 ? std::max<std::int64_t>(0, first_position(s) + query + 1 - a.window) : 0;
  }
  row_block block(int s, int head, std::int64_t first, std::int64_t last) const {
    return {s, head, first, last, begin(s, first / group), end(s, (last - 1) / group)};
  }

  const void* query(const row_block& b, std::int64_t row) const {
    return at(a.query.data, place(a.query.strides, b, row), a.type);
  }
  void* out(const row_block& b, std::int64_t row) const {
    return const_cast<void*>(at(a.out, place(a.out_strides, b, row), a.type));
  }
  const void* mask(const row_block& b, std::int64_t row, std::int64_t position) const {
    const attention_strides& s = a.mask.strides;
    const std::size_t size = a.mask_kind == mask_type::boolean ? 1 : a.mask_kind == mask_type::f32 ? 4 : 2;
    const std::ptrdiff_t element = b.sequence * s.sequence + query_head(b, row) * s.head + row / group * s.position;
    return static_cast<const char*>(a.mask.data) + (element + position) * static_cast<std::ptrdiff_t>(size);
  }
  // Addresses of what lies at the positions [p, p + count), in elements of `size` bytes.
  void positions(const attention_place& place, std::size_t size, const row_block& b, std::int64_t p, int count,
                 const void** out) const {
    const attention_strides& s = place.strides;
    const auto bytes = static_cast<std::ptrdiff_t>(size);
    for (int done = 0, run; done < count; done += run, p += run) {
      std::int64_t block = b.sequence, inside = p;
      run = count - done;
      if (a.block_table) {
        block = a.block_table[b.sequence * a.table_stride + p / a.block_size];
        inside = p % a.block_size;
        run = static_cast<int>(std::min<std::int64_t>(run, a.block_size - inside));
      }
      const char* first =
          static_cast<const char*>(place.data) + (block * s.sequence + b.head * s.head + inside * s.position) * bytes;
      for (int i = 0; i < run; ++i) out[done + i] = first + i * s.position * bytes;
    }
  }
  std::size_t kv_bytes(const attention_scales& s) const { return s.group ? 1 : size_of(a.kv_type); }
  int query_head(const row_block& b, std::int64_t row) const { return b.head * group + static_cast<int>(row % group); }

  const attention_arguments& a;
  const int group;
  const std::size_t width;

 private:
  std::ptrdiff_t place(const attention_strides& s, const row_block& b, std::int64_t row) const {
    const std::int64_t from = a.query_starts ? a.query_starts[b.sequence] : 0;
    const int sequence = a.query_starts ? 0 : b.sequence;
    return sequence * s.sequence + query_head(b, row) * s.head + (from + row / group) * s.position;
  }
  static const void* at(const void* data, std::ptrdiff_t element, dtype type) {
    return static_cast<const char*>(data) + element * static_cast<std::ptrdiff_t>(size_of(type));
  }
};

// Memory of one state.
struct state_size {
  std::size_t rows, width;
  std::size_t floats() const { return padded(rows, 16) + rows * (attention_sums + width); }
  attention_state at(float* p) const {
    float* sums = p + padded(rows, 16);
    return {p, sums, sums + rows * attention_sums, width};
  }
};

void clear(const attention_state& state, int rows) {
  std::fill_n(state.max, rows, attention_lowest);
  std::fill_n(state.sums, rows * attention_sums, 0.0f);
  std::fill_n(state.out, rows * state.width, 0.0f);
}

// Rows that let queries, states and scores lie in the second-level cache.
std::int64_t block_rows(const attention_view& v) {
  const std::size_t one = (v.a.key_size + 2 * v.width + attention_tile) * sizeof(float);
  return std::clamp<std::int64_t>(l2_bytes() / 2 / one, 16, attention_rows);
}

// Blocks with the most positions first, so that threads end together.
std::vector<row_block> cut(const attention_view& v) {
  std::vector<row_block> blocks;
  const std::int64_t most = block_rows(v);
  for (int s = 0; s < v.a.sequences; ++s) {
    const std::int64_t rows = v.queries(s) * v.group, count = (rows + most - 1) / most;
    for (std::int64_t i = count; i-- > 0;)
      for (int h = 0; h < v.a.kv_heads; ++h) blocks.push_back(v.block(s, h, rows * i / count, rows * (i + 1) / count));
  }
  std::stable_sort(blocks.begin(), blocks.end(), [](const row_block& x, const row_block& y) {
    return (x.end - x.begin) * x.rows() > (y.end - y.begin) * y.rows();
  });
  return blocks;
}

// Cuts off what a mask hides at both ends of [begin, end), and returns whether it hides more in between.
bool narrow(const unsigned char* mask, std::int32_t& begin, std::int32_t& end) {
  while (begin < end && !mask[begin]) ++begin;
  while (begin < end && !mask[end - 1]) --end;
  bool whole = true;
  for (std::int32_t j = begin; j < end; ++j) whole &= mask[j] != 0;
  return !whole;
}

// Where the keys or the values of a tile and of the next one lie.
class tile_rows {
 public:
  tile_rows(const attention_view& v, const attention_place& place, const attention_scales& scales, const row_block& b,
            std::int64_t p, int count)
      : bytes_(v.kv_bytes(scales)), group_(scales.group) {
    v.positions(place, bytes_, b, p, count, rows_);
    if (group_) v.positions(scales.place, sizeof(float), b, p, count, scales_);
  }
  pack_tile_job pack(int count, dtype type, std::size_t size, void* packed) const {
    return {rows_, count, type, size, packed, group_ ? scales_ : nullptr, group_};
  }
  fetch_rows fetch(int next, std::size_t size) const { return {rows_ + attention_tile, next, size * bytes_}; }
  fetch_rows fetch_scales(int next, std::size_t size) const {
    if (!group_) return {nullptr, 0, 0};
    return {scales_ + attention_tile, next, size / group_ * sizeof(float)};
  }

 private:
  const std::size_t bytes_, group_;  // of an element; 0: no scales
  const void *rows_[2 * attention_tile], *scales_[2 * attention_tile];
};

// A thread's work on one block after the other.
class block_worker {
 public:
  block_worker(const attention_view& view, const attention_kernels& kernels, buffer& memory, std::size_t rows)
      : v_(view), k_(kernels), key_size_(padded(view.a.key_size, kernels.key_unit)) {
    const std::size_t keys = attention_tile * key_size_ * k_.bytes, values = attention_tile * v_.width * k_.bytes;
    const state_size size{rows, v_.width};
    const std::size_t scores = rows * attention_tile * sizeof(float), state = size.floats() * sizeof(float);
    const std::size_t queries = padded(rows * key_size_ * k_.bytes, sizeof(float));
    memory.reserve(keys + values + scores + queries + 2 * state);
    keys_ = memory.as<char>();
    values_ = keys_ + keys;
    scores_ = reinterpret_cast<float*>(values_ + values);
    queries_ = values_ + values + scores;
    split_ = size.at(reinterpret_cast<float*>(queries_ + queries));
    whole_ = size.at(reinterpret_cast<float*>(queries_ + queries + state));
  }

  const attention_state& split_state() const { return split_; }
  const attention_state& whole_state() const { return whole_; }

  void begin(const row_block& b) {
    const void* rows[attention_rows];
    for (int r = 0; r < b.rows(); ++r) rows[r] = v_.query(b, b.first + r);
    k_.unpack_rows({rows, b.rows(), v_.a.type, v_.a.key_size, key_size_, queries_});
  }

  // `until`: the position at which the thread's work on the block ends.
  void run_split(const row_block& b, std::int64_t split, std::int64_t until, const attention_state& state) {
    clear(state, b.rows());
    const std::int64_t from = split * attention_split;
    const std::int64_t first = std::max(from, b.begin / attention_tile * attention_tile);
    const std::int64_t last = std::min(from + attention_split, b.end);
    for (std::int64_t p = first; p < last; p += attention_tile) run_tile(b, p, until, state);
  }

  void finish(const row_block& b, const attention_state& state) const {
    void* out[attention_rows];
    float sinks[attention_rows];
    for (int r = 0; r < b.rows(); ++r) {
      out[r] = v_.out(b, b.first + r);
      if (v_.a.sinks) sinks[r] = v_.a.sinks[v_.query_head(b, b.first + r)];
    }
    k_.finish({state, b.rows(), v_.a.sinks ? sinks : nullptr, out, v_.a.type, v_.a.value_size});
  }

 private:
  void run_tile(const row_block& b, std::int64_t p, std::int64_t until, const attention_state& state) {
    const attention_arguments& a = v_.a;
    const int count = static_cast<int>(std::min<std::int64_t>(attention_tile, v_.length(b.sequence) - p));
    const int next = static_cast<int>(std::clamp<std::int64_t>(until - p - attention_tile, 0, attention_tile));
    const void* masks[attention_rows];
    const tile_rows keys(v_, a.key, a.key_scales, b, p, next ? attention_tile + next : count);
    const tile_rows values(v_, a.value, a.value_scales, b, p, next ? attention_tile + next : count);
    std::int32_t begin[attention_rows], end[attention_rows];
    bool masked = a.mask_kind != mask_type::none && a.mask_kind != mask_type::boolean;
    std::int64_t query = b.first / v_.group, next_query = (query + 1) * v_.group - b.first;  // from this row on
    std::int32_t begin_seen = 0, end_seen = 0;
    for (int r = 0; r < b.rows(); ++r) {
      const bool another = r == next_query;
      if (another) ++query, next_query += v_.group;
      if (another || r == 0) {
        begin_seen = inside(v_.begin(b.sequence, query) - p);
        end_seen = inside(v_.end(b.sequence, query) - p);
      }
      begin[r] = begin_seen;
      end[r] = end_seen;
      if (a.mask_kind == mask_type::none) continue;
      masks[r] = v_.mask(b, b.first + r, p);
      if (a.mask_kind == mask_type::boolean) {
        const bool same = r > 0 && !another && masks[r] == masks[r - 1];
        if (same)
          begin[r] = begin[r - 1], end[r] = end[r - 1];
        else
          masked |= narrow(static_cast<const unsigned char*>(masks[r]), begin[r], end[r]);
      }
    }
    // Rows at both ends that see nothing of the tile are left out.
    int first = 0, last = b.rows();
    while (first < last && begin[first] >= end[first]) ++first;
    while (first < last && begin[last - 1] >= end[last - 1]) --last;
    if (first == last) return;
    k_.pack_keys(keys.pack(count, a.kv_type, a.key_size, keys_));
    const bool finite = k_.pack_values(values.pack(count, a.kv_type, a.value_size, values_));
    const attention_state rows = {state.max + first, state.sums + first * attention_sums,
                                  state.out + first * state.width, state.width};
    k_.attend({queries_ + first * key_size_ * k_.bytes,
               key_size_,
               last - first,
               keys_,
               values_,
               a.value_size,
               finite,
               begin + first,
               end + first,
               masked ? a.mask_kind : mask_type::none,
               masks + first,
               count,
               a.scale,
               a.softcap,
               scores_,
               rows,
               {keys.fetch(next, a.key_size), values.fetch(next, a.value_size), keys.fetch_scales(next, a.key_size),
                values.fetch_scales(next, a.value_size)}});
  }
  static std::int32_t inside(std::int64_t position) {
    return static_cast<std::int32_t>(std::clamp<std::int64_t>(position, 0, attention_tile));
  }

  const attention_view& v_;
  const attention_kernels& k_;
  const std::size_t key_size_;
  char *keys_, *values_, *queries_;
  float* scores_;
  attention_state split_, whole_;
};

// Each block from its first split to its last on one thread.
void run_blocks(const attention_view& v, const attention_kernels& k, const std::vector<row_block>& blocks,
                std::size_t rows, thread_pool& pool, context_scratch& scratch) {
  queue q(blocks.size());
  auto run = [&](int thread) {
    const denormals_are_zero mode;
    block_worker worker(v, k, scratch.threads[thread].attention, rows);
    for (std::size_t i; q.has(i = q.take());) {
      const row_block& b = blocks[i];
      worker.begin(b);
      clear(worker.whole_state(), b.rows());
      for (std::int64_t s = b.first_split(); s < b.last_split(); ++s) {
        worker.run_split(b, s, b.end, worker.split_state());
        k.merge({worker.split_state(), b.rows(), worker.whole_state()});
      }
      worker.finish(b, worker.whole_state());
    }
  };
  pool.run(run);
}

// Many splits of all blocks at a time, some of one block after the other on any thread; then they are merged in order.
void run_splits(const attention_view& v, const attention_kernels& k, const std::vector<row_block>& blocks,
                std::size_t rows, std::int64_t splits, thread_pool& pool, context_scratch& scratch) {
  const state_size size{rows, v.width};
  const std::int64_t count = static_cast<std::int64_t>(blocks.size()), items_wanted = 8 * pool.size();
  const std::int64_t fit = states_bytes / static_cast<std::int64_t>(count * size.floats() * sizeof(float));
  const std::int64_t at_once = std::min(splits, std::max(fit, (items_wanted + count - 1) / count));
  const std::int64_t together = std::max<std::int64_t>(1, at_once * count / items_wanted);
  const std::int64_t parts = (at_once + together - 1) / together;  // of a block's splits
  scratch.attention.reserve(count * (at_once + 1) * size.floats() * sizeof(float));
  const auto state = [&](std::int64_t block, std::int64_t i) {
    return size.at(scratch.attention.as<float>() + (block * (at_once + 1) + i) * size.floats());
  };
  for (std::int64_t i = 0; i < count; ++i) clear(state(i, at_once), blocks[i].rows());
  for (std::int64_t first = 0; first < splits; first += at_once) {
    queue items(count * parts);
    auto run = [&](int thread) {
      const denormals_are_zero mode;
      block_worker worker(v, k, scratch.threads[thread].attention, rows);
      for (std::size_t i; items.has(i = items.take());) {
        const std::int64_t which = i / parts, from = i % parts * together, to = std::min(from + together, at_once);
        const row_block& b = blocks[which];
        const std::int64_t begin = b.first_split() + first;
        if (begin + from >= b.last_split()) continue;
        worker.begin(b);
        for (std::int64_t s = from; s < to && begin + s < b.last_split(); ++s)
          worker.run_split(b, begin + s, std::min(b.end, (begin + to) * attention_split), state(which, s));
      }
    };
    pool.run(run);
    queue wholes(count);
    auto merge = [&](int thread) {
      const denormals_are_zero mode;
      const block_worker worker(v, k, scratch.threads[thread].attention, rows);
      for (std::size_t i; wholes.has(i = wholes.take());) {
        const row_block& b = blocks[i];
        const std::int64_t ready = std::min(at_once, b.last_split() - b.first_split() - first);
        for (std::int64_t s = 0; s < ready; ++s) k.merge({state(i, s), b.rows(), state(i, at_once)});
        if (first + at_once >= splits) worker.finish(b, state(i, at_once));
      }
    };
    if (count > 1)
      pool.run(merge);
    else
      merge(0);
  }
}

}  // namespace

void context::attention(const kernel_table& kernels, const attention_arguments& arguments) {
  const attention_view view(arguments);
  const std::vector<row_block> blocks = cut(view);
  if (blocks.empty()) return;
  const std::lock_guard lock(turn_);
  std::int64_t rows = 0, splits = 0;
  for (const row_block& b : blocks) {
    rows = std::max<std::int64_t>(rows, b.rows());
    splits = std::max(splits, b.last_split() - b.first_split());
  }
  const bool bf16 = arguments.type == dtype::bf16 && arguments.kv_type == dtype::bf16 && !arguments.key_scales.group &&
                    !arguments.value_scales.group;
  const attention_kernels& k = bf16 ? kernels.attention_bf16 : kernels.attention;
  const std::int64_t threads = pool_.size(), count = static_cast<std::int64_t>(blocks.size());
  if (count >= 4 * threads || splits <= 1 || threads == 1) {
    run_blocks(view, k, blocks, rows, pool_, *scratch_);
  } else {
    run_splits(view, k, blocks, rows, splits, pool_, *scratch_);
  }
}

}  // namespace kt
