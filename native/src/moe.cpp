// One MoE layer in two phases. gate_up: an item is a block of rows of one expert and a few panels; its thread packs
// the rows into its own cache and writes the activated block for the second phase. down: an item is a few panels of
// the output over all experts in ascending order, so that sums need no merging and no lock. Neither the cut into
// blocks and items nor the number of threads changes the order in which any element is summed. Slices of the experts
// have both phases each for itself; their sums are added in the order of slices. Dynamic formats quantise the rows
// of `hidden` before the first phase, and the activated ones before the second.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "scratch.h"

namespace kt {
namespace {
#include "../kernels/float_bits.inl"

float get_float(const void* p, dtype type, std::size_t i) {
  if (type == dtype::f32) return static_cast<const float*>(p)[i];
  const std::uint16_t h = static_cast<const std::uint16_t*>(p)[i];
  return type == dtype::f16 ? f16_to_f32(h) : as_f32(static_cast<std::uint32_t>(h) << 16);
}

// The (token, weight) pairs of the experts that have any, experts and tokens ascending.
struct routing {
  std::vector<int> expert;
  std::vector<std::size_t> begin;  // rows of expert[i]: [begin[i], begin[i + 1])
  std::vector<std::int32_t> token;
  std::vector<float> weight;
};

// Costs nothing for experts without tokens: `counts` is zero for all experts before and after.
std::string bucket(const moe_arguments& a, std::size_t first_token, std::size_t tokens, int num_experts,
                   std::vector<std::size_t>& counts, routing& r) {
  const std::size_t slots = tokens * a.top_k, first_slot = first_token * a.top_k;
  const auto id_at = [&](std::size_t i) -> std::int64_t {
    return a.ids_type == id_type::i64 ? static_cast<const std::int64_t*>(a.ids)[first_slot + i]
                                      : static_cast<const std::int32_t*>(a.ids)[first_slot + i];
  };
  const auto weight_at = [&](std::size_t i) { return get_float(a.weights, a.weights_type, first_slot + i); };
  const auto slot_name = [&](const char* tensor, std::size_t i) {
    return std::string(tensor) + "[" + std::to_string(first_token + i / a.top_k) + ", " + std::to_string(i % a.top_k) +
           "] is ";
  };
  for (std::size_t i = 0; i < slots; ++i) {
    if (id_at(i) < 0)
      return slot_name("topk_ids", i) + std::to_string(id_at(i)) +
             "; ids are 0 or more (ids >= num_experts are skipped)";
    if (id_at(i) < num_experts && !std::isfinite(weight_at(i)))
      return slot_name("topk_weights", i) + std::to_string(weight_at(i)) + "; routing weights must be finite";
  }
  if (counts.size() < static_cast<std::size_t>(num_experts)) counts.resize(num_experts);
  // From here on nothing throws, so that the counts are zero again in any case.
  const std::size_t most = std::min(slots, static_cast<std::size_t>(num_experts));
  r.expert.clear();
  r.expert.reserve(most);
  r.begin.reserve(most + 1);
  r.token.reserve(slots);
  r.weight.reserve(slots);
  for (std::size_t i = 0; i < slots; ++i)
    if (const std::int64_t id = id_at(i); id < num_experts && counts[id]++ == 0)
      r.expert.push_back(static_cast<int>(id));
  std::sort(r.expert.begin(), r.expert.end());
  r.begin.assign(1, 0);
  for (const int e : r.expert) {
    r.begin.push_back(r.begin.back() + counts[e]);
    counts[e] = r.begin[r.begin.size() - 2];  // where its next row goes
  }
  r.token.resize(r.begin.back());
  r.weight.resize(r.begin.back());
  for (std::size_t i = 0; i < slots; ++i) {
    const std::int64_t id = id_at(i);
    if (id >= num_experts) continue;
    r.token[counts[id]] = static_cast<std::int32_t>(i / a.top_k);
    r.weight[counts[id]++] = weight_at(i);
  }
  for (const int e : r.expert) counts[e] = 0;
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

// Blocks of near-equal size, of at most `most` rows.
std::vector<block> cut_blocks(const routing& r, std::size_t most) {
  std::vector<block> blocks;
  for (std::size_t e = 0; e < r.expert.size(); ++e) {
    const std::size_t rows = r.begin[e + 1] - r.begin[e], count = (rows + most - 1) / most;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t begin = rows * i / count, end = rows * (i + 1) / count;
      blocks.push_back({r.expert[e], r.begin[e] + begin, static_cast<int>(end - begin)});
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

// One slice of the experts in a run: what its phases write and the items of work that are left.
struct slice_run {
  slice_run(const kernel_table& k, const expert_slice& slice) : s(slice), up(k, slice.gate_up), down(k, slice.down) {}

  const expert_slice& s;
  block_gemm up, down;
  std::vector<item> items;
  char* hidden = nullptr;    // activated rows, packed for the second phase
  float* scale = nullptr;    // dynamic formats: of each activated row
  float* plain = nullptr;    // dynamic formats: activated rows before they are quantised
  float* partial = nullptr;  // [panel][token][32], where there are several slices
  queue up_queue, quantize_queue, down_queue;
};

// A run of all phases over tokens [first_token, first_token + tokens).
class layer_run {
 public:
  layer_run(const experts& e, const kernel_table& k, const moe_arguments& a, std::size_t first_token,
            std::size_t tokens, const routing& r, context_scratch& scratch)
      : e_(e),
        k_(k),
        a_(a),
        r_(r),
        first_token_(first_token),
        tokens_(tokens),
        dynamic_(is_dynamic(e.format.kind)),
        rows_(k.rows_for(e.format.kind)),
        scratch_(scratch),
        blocks_(cut_blocks(r, kt::most_rows)) {
    for (const block& b : blocks_) most_rows_ = std::max(most_rows_, b.rows);
  }

  void run(thread_pool& pool, const std::vector<thread_place>& places) {
    prepare(pool.size());
    const auto phase = [&](auto work) {
      auto each = [&](int thread) {
        const denormals_are_zero mode;
        // Its own slice first, then what is left of the others.
        for (std::size_t i = 0; i < slices_.size(); ++i)
          work(slices_[(places[thread].slice + i) % slices_.size()], scratch_.threads[thread], thread);
      };
      pool.run(each);
    };
    if (dynamic_) quantize_tokens(pool);
    phase([this](slice_run& s, thread_scratch& t, int thread) { gate_up_items(s, t, thread); });
    if (dynamic_) phase([this](slice_run& s, thread_scratch& t, int) { quantize_blocks(s, t); });
    phase([this](slice_run& s, thread_scratch& t, int thread) {
      queue& q = s.down_queue;
      for (std::size_t g = q.take(thread), next; q.has(g); g = next) {
        next = q.take(thread);
        down_group(s, g * group_, q.has(next) ? next * group_ : panels(), t);
      }
    });
    if (slices_.size() > 1) add_slices(pool);
  }

 private:
  void prepare(int threads);
  void quantize_tokens(thread_pool& pool);
  void gate_up_items(slice_run& s, thread_scratch& t, int thread) const;
  void quantize_blocks(slice_run& s, thread_scratch& t) const;
  void down_group(slice_run& s, std::size_t first_panel, std::size_t next_panel, thread_scratch& t) const;
  void add_slices(thread_pool& pool);
  void pack_tokens(const slice_run& s, const block& b, thread_scratch& t) const;
  void store(std::size_t panel, const float* sum) const;

  std::size_t panels() const { return e_.slices.front().down.panels(); }  // of the output
  // Of quantised rows: scales of one of `hidden`, and k that share one.
  std::size_t token_scales() const { return slices_.front().s.gate_up.layout().row_scales(); }
  std::size_t row_group() const { return static_cast<std::size_t>(e_.format.group); }

  const experts& e_;
  const kernel_table& k_;
  const moe_arguments& a_;
  const routing& r_;
  const std::size_t first_token_, tokens_;
  const bool dynamic_;
  const row_kernels& rows_;
  context_scratch& scratch_;
  const std::vector<block> blocks_;
  int most_rows_ = 1;
  std::size_t group_ = 1;  // panels of the output in one item
  std::vector<slice_run> slices_;
};

void layer_run::prepare(int threads) {
  scratch_.slices.resize(e_.slices.size());
  slices_.reserve(e_.slices.size());
  const std::size_t rows = r_.token.size();
  // For large inputs an item re-reads all of `hidden`, which wants few items; for small ones a panel of an expert is a
  // short stream of its own, and the panels of an item follow one another, as do the items of a thread.
  const bool in_cache = rows * block_gemm(k_, e_.slices.front().down).row_bytes() <= 2 * l2_bytes();
  const int shares = in_cache ? std::max(1, threads / static_cast<int>(e_.slices.size())) : 1;
  group_ = std::max<std::size_t>(1, panels() / (static_cast<std::size_t>(threads) * (in_cache ? 8 : 4)));
  std::size_t row_bytes = 0, c_bytes = 0;
  for (std::size_t i = 0; i < e_.slices.size(); ++i) {
    const expert_slice& s = e_.slices[i];
    slice_run& run = slices_.emplace_back(k_, s);
    run.items = cut_items(blocks_, s.gate_up.panels(), threads);
    run.up_queue = queue(run.items.size(), shares);
    run.quantize_queue = queue(blocks_.size());
    run.down_queue = queue((panels() + group_ - 1) / group_, shares);
    slice_scratch& memory = scratch_.slices[i];
    memory.hidden.reserve(rows * run.down.row_bytes());
    run.hidden = memory.hidden.as();
    if (dynamic_) {
      memory.plain.reserve(rows * s.down.layout().k * sizeof(float));
      memory.scale.reserve(rows * s.down.layout().row_scales() * sizeof(float));
      run.plain = memory.plain.as<float>();
      run.scale = memory.scale.as<float>();
    }
    if (e_.slices.size() > 1) {
      memory.partial.reserve(panels() * tokens_ * panel_columns * sizeof(float));
      run.partial = memory.partial.as<float>();
    }
    row_bytes = std::max({row_bytes, run.up.row_bytes(), dynamic_ ? s.down.layout().k : 0});
    c_bytes = std::max({c_bytes, run.up.c_bytes(most_rows_), run.down.c_bytes(most_rows_)});
  }
  for (thread_scratch& t : scratch_.threads) {
    t.rows.reserve(most_rows_ * row_bytes);
    t.c.reserve(c_bytes);
    t.scale.reserve(most_rows_ * token_scales() * sizeof(float));
    t.sum.reserve(group_ * tokens_ * panel_columns * sizeof(float));
  }
}

void layer_run::quantize_tokens(thread_pool& pool) {
  const std::size_t k = slices_.front().s.gate_up.layout().k, size = size_of(a_.hidden_type);
  const std::size_t scales = token_scales();
  scratch_.rows.reserve(tokens_ * k);
  scratch_.scale.reserve(tokens_ * scales * sizeof(float));
  constexpr std::size_t at_once = 4;
  queue q((tokens_ + at_once - 1) / at_once);
  auto work = [&](int) {
    const denormals_are_zero mode;
    for (std::size_t i; q.has(i = q.take());) {
      const std::size_t first = i * at_once;
      k_.quantize_rows({static_cast<const char*>(a_.hidden) + (first_token_ + first) * a_.hidden_stride * size,
                        a_.hidden_type, a_.hidden_stride, std::min(at_once, tokens_ - first), e_.shape.hidden_size, k,
                        scratch_.rows.as<std::int8_t>() + first * k, scratch_.scale.as<float>() + first * scales,
                        row_group()});
    }
  };
  // A few are not worth waking the other threads up for.
  if (tokens_ <= at_once)
    work(0);
  else
    pool.run(work);
}

void layer_run::pack_tokens(const slice_run& s, const block& b, thread_scratch& t) const {
  const std::size_t k = s.s.gate_up.layout().k;
  const std::int32_t* tokens = r_.token.data() + b.begin;
  if (!dynamic_) {
    const std::size_t first = first_token_ * a_.hidden_stride * size_of(a_.hidden_type);
    return rows_.pack({static_cast<const char*>(a_.hidden) + first, a_.hidden_type, a_.hidden_stride, tokens, b.rows,
                       e_.shape.hidden_size, k, t.rows.as()});
  }
  rows_.pack({scratch_.rows.as(), dtype::f32, k, tokens, b.rows, k, k, t.rows.as()});
  const std::size_t scales = token_scales();
  for (int r = 0; r < b.rows; ++r)
    std::copy_n(scratch_.scale.as<float>() + tokens[r] * scales, scales, t.scale.as<float>() + r * scales);
}

void layer_run::gate_up_items(slice_run& s, thread_scratch& t, int thread) const {
  const packed_weight& w = s.s.gate_up;
  queue& q = s.up_queue;
  const std::size_t columns = e_.shape.act.gated ? panel_columns / 2 : panel_columns, k = s.s.down.layout().k;
  const bool round = a_.hidden_type == dtype::bf16 && in_bf16(e_.format.kind);
  std::size_t packed = blocks_.size();  // the block that t.rows holds
  for (std::size_t i = q.take(thread), next; q.has(i); i = next) {
    next = q.take(thread);
    const item& it = s.items[i];
    const block& b = blocks_[it.block];
    if (packed != it.block) pack_tokens(s, b, t);
    packed = it.block;
    char* const to =
        dynamic_ ? reinterpret_cast<char*>(s.plain + b.begin * k) : s.hidden + b.begin * s.down.row_bytes();
    const char* following = q.has(next) ? w.panel(blocks_[s.items[next].block].expert, s.items[next].panel) : nullptr;
    s.up.run(b.expert, it.panel, it.panel + it.panels, t.rows.as(), b.rows, t.scale.as<float>(), t.c.as<float>(),
             following, [&](std::size_t p, const float* c) {
               rows_.activate({c, b.rows, w.panel_bias(b.expert, p), e_.shape.act, round, p * columns, k, to});
             });
  }
}

void layer_run::quantize_blocks(slice_run& s, thread_scratch& t) const {
  const std::size_t k = s.s.down.layout().k, scales = s.s.down.layout().row_scales();
  for (std::size_t i; s.quantize_queue.has(i = s.quantize_queue.take());) {
    const block& b = blocks_[i];
    k_.quantize_rows({s.plain + b.begin * k, dtype::f32, k, static_cast<std::size_t>(b.rows), k, k,
                      t.rows.as<std::int8_t>(), s.scale + b.begin * scales, row_group()});
    rows_.pack({t.rows.as(), dtype::f32, k, nullptr, b.rows, k, k, s.hidden + b.begin * k});
  }
}

// next: the first panel of what the thread does afterwards; panels(): nothing.
void layer_run::down_group(slice_run& s, std::size_t first, std::size_t next, thread_scratch& t) const {
  const packed_weight& w = s.s.down;
  const std::size_t last = std::min(first + group_, w.panels()), sum_size = tokens_ * panel_columns;
  const std::size_t scales = w.layout().row_scales();
  std::memset(t.sum.as(), 0, (last - first) * sum_size * sizeof(float));
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const block& b = blocks_[i];
    const char* following = i + 1 < blocks_.size() ? w.panel(blocks_[i + 1].expert, first)
                            : next < panels()      ? w.panel(blocks_.front().expert, next)
                                                   : nullptr;
    s.down.run(b.expert, first, last, s.hidden + b.begin * s.down.row_bytes(), b.rows, s.scale + b.begin * scales,
               t.c.as<float>(), following, [&](std::size_t p, const float* c) {
                 k_.accumulate({c, b.rows, w.panel_bias(b.expert, p), r_.weight.data() + b.begin,
                                r_.token.data() + b.begin, t.sum.as<float>() + (p - first) * sum_size});
               });
  }
  if (slices_.size() > 1)
    std::memcpy(s.partial + first * sum_size, t.sum.as(), (last - first) * sum_size * sizeof(float));
  else
    for (std::size_t p = first; p < last; ++p) store(p, t.sum.as<float>() + (p - first) * sum_size);
}

void layer_run::add_slices(thread_pool& pool) {
  queue q(panels());
  auto work = [&](int) {
    const denormals_are_zero mode;
    for (std::size_t p; q.has(p = q.take());) {
      const std::size_t size = tokens_ * panel_columns;
      float* sum = slices_.front().partial + p * size;
      for (std::size_t s = 1; s < slices_.size(); ++s)
        for (std::size_t i = 0; i < size; ++i) sum[i] += slices_[s].partial[p * size + i];
      store(p, sum);
    }
  };
  pool.run(work);
}

void layer_run::store(std::size_t panel, const float* sum) const {
  const std::size_t column = panel * panel_columns, left = e_.shape.hidden_size - column;
  k_.store({sum, nullptr, tokens_, static_cast<int>(std::min<std::size_t>(left, panel_columns)),
            static_cast<char*>(a_.out) + (first_token_ * a_.out_stride + column) * size_of(a_.hidden_type),
            a_.hidden_type, a_.out_stride});
}

// How many parts of the tokens run one after the other. What lies between the phases takes no more than this,
constexpr std::size_t most_hidden_bytes = std::size_t{128} << 20;
// and fewer rows stay in the last-level cache, down to so many of an expert that hide its weights' way from memory.
// Tiles hide it with more rows only.
constexpr std::size_t enough_rows = 128;

std::size_t parts(const experts& e, const kernel_table& kernels, const moe_arguments& a) {
  const std::size_t rows = a.tokens * a.top_k, experts = e.shape.num_experts;
  const std::size_t by_memory = rows * e.shape.intermediate_size * sizeof(float) / most_hidden_bytes + 1;
  const std::size_t by_rows = kernels.tiles ? 1 : rows / (std::max<std::size_t>(1, experts) * enough_rows);
  return std::min(a.tokens, std::max(by_memory, by_rows));
}

}  // namespace

std::string context::moe(const experts& e, const kernel_table& kernels, const moe_arguments& a) {
  const std::lock_guard lock(turn_);
  const std::size_t count = parts(e, kernels, a);
  routing route;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t first = a.tokens * i / count, tokens = a.tokens * (i + 1) / count - first;
    if (std::string wrong = bucket(a, first, tokens, e.shape.num_experts, scratch_->counts, route); !wrong.empty())
      return wrong;
    for (std::size_t used = 0; used < route.expert.size(); ++used)
      __atomic_fetch_add(&e.tokens[route.expert[used]], route.begin[used + 1] - route.begin[used], __ATOMIC_RELAXED);
    layer_run(e, kernels, a, first, tokens, route, *scratch_).run(pool_, places_);
  }
  return {};
}

}  // namespace kt
