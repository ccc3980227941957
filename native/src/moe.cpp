// One MoE layer in two phases. gate_up: an item is a block of rows of one expert and a few panels; its thread packs
// the rows into its own cache and writes the activated block for the second phase. down: an item is a few panels of
// the output over all experts in ascending order, so that sums need no merging and no lock. Neither the cut into
// blocks and items nor the number of threads changes the order in which any element is summed.
#include <kt/moe.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace kt {
namespace {
#include "../kernels/float_bits.inl"

// Denormals are zero while kernels run, as VDPBF16PS has it.
class denormals_are_zero {
#if defined(__SSE__)
 public:
  denormals_are_zero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~denormals_are_zero() { _mm_setcsr(saved_); }
  denormals_are_zero(const denormals_are_zero&) = delete;
  denormals_are_zero& operator=(const denormals_are_zero&) = delete;

 private:
  unsigned saved_;
#endif
};

float get_float(const void* p, dtype type, std::size_t i) {
  if (type == dtype::f32) return static_cast<const float*>(p)[i];
  const std::uint16_t h = static_cast<const std::uint16_t*>(p)[i];
  return type == dtype::f16 ? f16_to_f32(h) : as_f32(static_cast<std::uint32_t>(h) << 16);
}

// The (token, weight) pairs of each expert, tokens ascending.
struct routing {
  std::vector<std::size_t> begin;  // rows of expert e: [begin[e], begin[e + 1])
  std::vector<std::int32_t> token;
  std::vector<float> weight;
};

std::string bucket(const moe_arguments& a, std::size_t first_token, std::size_t tokens, int num_experts, routing& r) {
  const std::size_t slots = tokens * a.top_k, first_slot = first_token * a.top_k;
  const auto id_at = [&](std::size_t i) -> std::int64_t {
    return a.ids_type == id_type::i64 ? static_cast<const std::int64_t*>(a.ids)[first_slot + i]
                                      : static_cast<const std::int32_t*>(a.ids)[first_slot + i];
  };
  r.begin.assign(num_experts + 1, 0);
  for (std::size_t i = 0; i < slots; ++i) {
    const std::int64_t id = id_at(i);
    if (id < 0)
      return "topk_ids[" + std::to_string(first_token + i / a.top_k) + ", " + std::to_string(i % a.top_k) + "] is " +
             std::to_string(id) + "; ids are 0 or more (ids >= num_experts are skipped)";
    if (id < num_experts) ++r.begin[id + 1];
  }
  for (int e = 0; e < num_experts; ++e) r.begin[e + 1] += r.begin[e];
  r.token.resize(r.begin[num_experts]);
  r.weight.resize(r.begin[num_experts]);
  std::vector<std::size_t> next(r.begin.begin(), r.begin.end() - 1);
  for (std::size_t i = 0; i < slots; ++i) {
    const std::int64_t id = id_at(i);
    if (id >= num_experts) continue;
    const float w = get_float(a.weights, a.weights_type, first_slot + i);
    if (!std::isfinite(w))
      return "topk_weights[" + std::to_string(first_token + i / a.top_k) + ", " + std::to_string(i % a.top_k) +
             "] is " + std::to_string(w) + "; routing weights must be finite";
    r.token[next[id]] = static_cast<std::int32_t>(i / a.top_k);
    r.weight[next[id]++] = w;
  }
  return {};
}

struct block {
  int expert;
  std::size_t begin;  // first row
  int rows;
};

struct item {
  std::size_t block, panel, panels;
};

std::size_t l2_bytes() {
  static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return size > 0 ? static_cast<std::size_t>(size) : std::size_t{1} << 20;
}

// Blocks of near-equal size whose packed rows take about half of the second-level cache.
std::vector<block> cut_blocks(const routing& r, std::size_t row_bytes) {
  const std::size_t most = std::clamp<std::size_t>(l2_bytes() / 2 / row_bytes, 12, 256);
  std::vector<block> blocks;
  for (std::size_t e = 0; e + 1 < r.begin.size(); ++e) {
    const std::size_t rows = r.begin[e + 1] - r.begin[e], count = (rows + most - 1) / most;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t begin = rows * i / count, end = rows * (i + 1) / count;
      blocks.push_back({static_cast<int>(e), r.begin[e] + begin, static_cast<int>(end - begin)});
    }
  }
  return blocks;
}

// Streaming a panel from memory takes about as long as multiplying it with this many rows.
constexpr int rows_hidden_by_memory = 12;

// Items of near-equal cost, about 32 for each thread; those of the last quarter are smaller, so that the threads end
// together.
std::vector<item> cut_items(const std::vector<block>& blocks, std::size_t panels, int threads) {
  const auto cost = [&](const block& b) {
    return static_cast<double>(std::max(b.rows, rows_hidden_by_memory)) * static_cast<double>(panels);
  };
  double total = 0, done = 0;
  for (const block& b : blocks) total += cost(b);
  const double target = total / (32.0 * threads);
  std::vector<item> items;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const double wanted = std::ceil(cost(blocks[i]) / (done < 0.75 * total ? target : target / 4));
    const std::size_t count = std::clamp<std::size_t>(static_cast<std::size_t>(wanted), 1, panels);
    for (std::size_t k = 0; k < count; ++k) {
      const std::size_t begin = panels * k / count, end = panels * (k + 1) / count;
      items.push_back({i, begin, end - begin});
    }
    done += cost(blocks[i]);
  }
  return items;
}

// Hands out [0, size) in order; each thread knows its next item before it starts the present one.
class queue {
 public:
  explicit queue(std::size_t size) : size_(size) {}
  std::size_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  bool has(std::size_t i) const { return i < size_; }

 private:
  const std::size_t size_;
  std::atomic<std::size_t> next_{0};
};

struct thread_scratch {
  buffer rows, c, sum;
};

// A run of both phases over tokens [first_token, first_token + tokens).
class layer_run {
 public:
  layer_run(const experts& e, const kernel_table& k, const moe_arguments& a, std::size_t first_token,
            std::size_t tokens, const routing& r)
      : e_(e),
        k_(k),
        a_(a),
        r_(r),
        first_token_(first_token),
        tokens_(tokens),
        element_(k.rows_in_bf16 ? 2 : 4),
        gemm_(k.gemm[static_cast<int>(e.down.format)]),
        blocks_(cut_blocks(r, e.gate_up.k * element_)) {}

  void run(thread_pool& pool, std::vector<thread_scratch>& scratch, buffer& hidden) {
    hidden.reserve(r_.token.size() * e_.down.k * element_);
    hidden_ = hidden.as();
    for (thread_scratch& t : scratch) reserve(t, pool.size());
    const std::vector<item> items = cut_items(blocks_, e_.gate_up.panels, pool.size());
    queue up(items.size());
    auto gate_up_phase = [&](int thread) {
      const denormals_are_zero mode;
      gate_up_items(items, up, scratch[thread]);
    };
    pool.run(gate_up_phase);
    queue down((e_.down.panels + group_ - 1) / group_);
    auto down_phase = [&](int thread) {
      const denormals_are_zero mode;
      for (std::size_t g; down.has(g = down.take());) down_group(g * group_, scratch[thread]);
    };
    pool.run(down_phase);
  }

 private:
  void reserve(thread_scratch& t, int threads);
  void gate_up_items(const std::vector<item>& items, queue& q, thread_scratch& t) const;
  void down_group(std::size_t first_panel, thread_scratch& t) const;

  char* hidden_of(const block& b) const { return hidden_ + b.begin * e_.down.k * element_; }

  const experts& e_;
  const kernel_table& k_;
  const moe_arguments& a_;
  const routing& r_;
  const std::size_t first_token_, tokens_, element_;
  void (*const gemm_)(const gemm_job&);
  const std::vector<block> blocks_;
  std::size_t group_ = 1;  // panels of the output in one item
  char* hidden_ = nullptr;
};

void layer_run::reserve(thread_scratch& t, int threads) {
  int rows = 1;
  for (const block& b : blocks_) rows = std::max(rows, b.rows);
  // Small inputs are cut finely; for large ones an item re-reads all of `hidden`, which wants few items.
  const bool in_cache = r_.token.size() * e_.down.k * element_ <= 2 * l2_bytes();
  const std::size_t items = static_cast<std::size_t>(threads) * (in_cache ? 16 : 4);
  group_ = std::max<std::size_t>(1, e_.down.panels / items);
  t.rows.reserve(rows * e_.gate_up.k * element_);
  t.c.reserve(rows * panel_columns * sizeof(float));
  t.sum.reserve(group_ * tokens_ * panel_columns * sizeof(float));
}

void layer_run::gate_up_items(const std::vector<item>& items, queue& q, thread_scratch& t) const {
  const packed_weight& w = e_.gate_up;
  const std::size_t columns = e_.shape.act.gated ? panel_columns / 2 : panel_columns;
  const auto first_panel = [&](std::size_t i) {
    return q.has(i) ? w.panel(blocks_[items[i].block].expert, items[i].panel) : nullptr;
  };
  std::size_t packed = blocks_.size();  // the block that t.rows holds
  for (std::size_t i = q.take(), next; q.has(i); i = next) {
    next = q.take();
    const item& it = items[i];
    const block& b = blocks_[it.block];
    if (packed != it.block) {
      const std::size_t row_bytes = a_.hidden_stride * size_of(a_.hidden_type);
      k_.pack_rows({static_cast<const char*>(a_.hidden) + first_token_ * row_bytes, a_.hidden_type, a_.hidden_stride,
                    r_.token.data() + b.begin, b.rows, e_.shape.hidden_size, w.k, t.rows.as()});
      packed = it.block;
    }
    for (std::size_t p = it.panel; p < it.panel + it.panels; ++p) {
      const char* following = p + 1 < it.panel + it.panels ? w.panel(b.expert, p + 1) : first_panel(next);
      gemm_({w.panel(b.expert, p), t.rows.as(), b.rows, w.k, t.c.as<float>(), following, w.panel_bytes()});
      const bool round = a_.hidden_type == dtype::bf16 && w.format == dtype::bf16;
      k_.activate({t.c.as<float>(), b.rows, w.panel_bias(b.expert, p), e_.shape.act, round, p * columns, e_.down.k,
                   hidden_of(b)});
    }
  }
}

void layer_run::down_group(std::size_t first, thread_scratch& t) const {
  const packed_weight& w = e_.down;
  const std::size_t last = std::min(first + group_, w.panels), sum_size = tokens_ * panel_columns;
  std::memset(t.sum.as(), 0, (last - first) * sum_size * sizeof(float));
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const block& b = blocks_[i];
    for (std::size_t p = first; p < last; ++p) {
      const char* following = p + 1 < last             ? w.panel(b.expert, p + 1)
                              : i + 1 < blocks_.size() ? w.panel(blocks_[i + 1].expert, first)
                                                       : nullptr;
      gemm_({w.panel(b.expert, p), hidden_of(b), b.rows, w.k, t.c.as<float>(), following, w.panel_bytes()});
      k_.accumulate({t.c.as<float>(), b.rows, w.panel_bias(b.expert, p), r_.weight.data() + b.begin,
                     r_.token.data() + b.begin, t.sum.as<float>() + (p - first) * sum_size});
    }
  }
  const std::size_t size = size_of(a_.hidden_type);
  for (std::size_t p = first; p < last; ++p) {
    const std::size_t column = p * panel_columns, left = e_.shape.hidden_size - column;
    k_.store({t.sum.as<float>() + (p - first) * sum_size, tokens_,
              static_cast<int>(std::min<std::size_t>(left, panel_columns)),
              static_cast<char*>(a_.out) + (first_token_ * a_.out_stride + column) * size, a_.hidden_type,
              a_.out_stride});
  }
}

// Activated rows between the phases take no more than this; longer inputs are run in several parts.
constexpr std::size_t most_hidden_bytes = std::size_t{128} << 20;

}  // namespace

struct context::scratch {
  std::vector<thread_scratch> threads;
  buffer hidden;
  routing route;
};

context::context(int threads) : pool_(threads), scratch_(std::make_unique<scratch>()) {
  scratch_->threads.resize(pool_.size());
}

context::~context() = default;

int context::threads() const { return pool_.size(); }

std::string context::moe(const experts& e, const kernel_table& kernels, const moe_arguments& a) {
  const std::lock_guard lock(turn_);
  const std::size_t token_bytes = a.top_k * e.down.k * sizeof(float);
  const std::size_t part = std::max<std::size_t>(1, most_hidden_bytes / std::max<std::size_t>(1, token_bytes));
  for (std::size_t first = 0; first < a.tokens; first += part) {
    const std::size_t tokens = std::min(part, a.tokens - first);
    if (std::string wrong = bucket(a, first, tokens, e.shape.num_experts, scratch_->route); !wrong.empty())
      return wrong;
    layer_run(e, kernels, a, first, tokens, scratch_->route).run(pool_, scratch_->threads, scratch_->hidden);
  }
  return {};
}

}  // namespace kt
