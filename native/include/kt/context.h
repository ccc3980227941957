// The forward passes: an MoE layer, a linear layer; and the threads and memory that they need.
#pragma once
#include <kt/attention.h>
#include <kt/experts.h>
#include <kt/norm.h>
#include <kt/rotary.h>
#include <kt/thread_pool.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace kt {

enum class id_type : std::uint8_t { i32, i64 };

// hidden [tokens][hidden_size], ids and weights [tokens][top_k], out [tokens][hidden_size]; strides of rows in
// elements.
struct moe_arguments {
  std::size_t tokens = 0;
  int top_k = 0;
  const void* hidden = nullptr;
  dtype hidden_type = dtype::f32;
  std::size_t hidden_stride = 0;
  const void* ids = nullptr;
  id_type ids_type = id_type::i64;
  const void* weights = nullptr;
  dtype weights_type = dtype::f32;
  void* out = nullptr;  // of hidden_type
  std::size_t out_stride = 0;
};

// in [rows][heads][k], out [rows][heads][features], both of `type`; strides in elements. Each head has its own weight.
struct linear_arguments {
  std::size_t rows = 0, k = 0, features = 0;  // of a head
  const void* in = nullptr;
  dtype type = dtype::f32;
  std::size_t in_stride = 0;
  void* out = nullptr;
  std::size_t out_stride = 0;
  std::size_t heads = 1, in_head_stride = 0, out_head_stride = 0;
};

// Distances in elements.
struct attention_strides {
  std::ptrdiff_t sequence = 0, head = 0, position = 0;
};

struct attention_place {
  const void* data = nullptr;
  attention_strides strides;
};

// Scales of codes of int8, in fp32: one for each `group` elements of a row; those of a row lie together.
struct attention_scales {
  attention_place place;
  std::size_t group = 0;  // 0: no scales, and no codes
};

// Queries and result are of `type`; keys and values of `kv_type`, or codes of int8 where they have scales; elements of
// one head lie together. Query heads are a multiple of those of keys: head h uses the keys of
// h / (query_heads / kv_heads).
struct attention_arguments {
  int sequences = 0, query_heads = 0, kv_heads = 0;
  std::size_t key_size = 0, value_size = 0;  // of a head
  dtype type = dtype::f32, kv_type = dtype::f32;
  attention_place query, key, value;
  attention_scales key_scales, value_scales;
  void* out = nullptr;
  attention_strides out_strides;
  std::int64_t queries = 0;                    // of each sequence
  const std::int64_t* query_starts = nullptr;  // [sequences + 1]: sequence s has the queries [starts[s], starts[s + 1])
                                               // of the first, instead; else null
  std::int64_t positions = 0;                  // of keys
  const std::int64_t* lengths = nullptr;       // of each sequence, fewer than `positions`; or null
  std::int64_t first = -1;                     // position of the first query of each; -1: the queries are last
  // Blocks of positions: position p of sequence s is p % block_size of block table[s][p / block_size], and the strides
  // of a sequence are those of a block. Null: sequence s is block s.
  const std::int32_t* block_table = nullptr;
  std::size_t table_stride = 0;
  std::int64_t block_size = 0;
  bool causal = false;
  std::int64_t window = 0;  // > 0: a query sees so many positions, the last of which is its own; causal
  attention_place mask;     // `position` steps over queries; those of keys lie together
  mask_type mask_kind = mask_type::none;
  const float* sinks = nullptr;  // [query_heads]
  float scale = 1.0f, softcap = 0.0f;
};

// Rows of keys or of values, [tokens][heads][size], and where their codes of int8 and their scales go.
struct store_kv_arguments {
  std::size_t tokens = 0, heads = 0, size = 0;
  const void* rows = nullptr;
  dtype type = dtype::f32;
  std::ptrdiff_t token_stride = 0, head_stride = 0;  // elements of a head lie together
  const std::int64_t* slots = nullptr;               // block * block_size + place of each token; negative: not stored
  std::int64_t block_size = 1;
  std::int8_t* codes = nullptr;
  attention_strides code_strides;  // of a block, a head, a position
  float* scales = nullptr;
  attention_strides scale_strides;
  std::size_t group = 0;  // elements that share a scale
};

// Where the threads of a context run.
struct thread_place {
  int slice = 0;  // whose memory is near: it works on this slice of the experts first
  int cpu = -1;   // -1: wherever the kernel likes
};

// Calls from several threads take turns.
class context {
 public:
  explicit context(int threads);
  explicit context(const std::vector<thread_place>& threads);
  ~context();
  int threads() const;

  // out[t] = sum over slots, in ascending order of expert, of weights[t][s] * expert(ids[t][s])(hidden[t]).
  // Ids >= num_experts are skipped. Returns an empty string, or what is wrong with which argument: a negative id,
  // a weight that is no finite number.
  std::string moe(const experts& e, const kernel_table& kernels, const moe_arguments& arguments);

  // out[r][h] = weight[h] * in[r][h] + bias. `weight` has an expert for each head.
  void linear(const packed_weight& weight, const kernel_table& kernels, const linear_arguments& arguments);

  // Work on [0, rows) in parts, on several threads where there are enough elements. Denormals are zero meanwhile.
  void each_row(std::size_t rows, std::size_t elements, const std::function<void(std::size_t, std::size_t)>& part);
  // Normalises rows, kt/norm.h.
  void norm(const kernel_table& kernels, const norm_job& job, std::size_t rows);
  // Rotates heads, kt/rotary.h.
  void rotary(const kernel_table& kernels, const rotary_job& job, std::size_t heads);
  // Softmax attention, kt/attention.h.
  void attention(const kernel_table& kernels, const attention_arguments& arguments);
  // Quantises rows to int8, as `quantize_rows` does (kt/kernels.h), into their slots.
  void store_kv(const kernel_table& kernels, const store_kv_arguments& arguments);

  // Measured ceilings of this machine with this context's threads. Memory that is read is kept until the next call
  // with another size.
  double read_bandwidth(const kernel_table& kernels, std::size_t bytes, int repeats);  // bytes per second
  double arithmetic(const kernel_table& kernels, bool int8, double seconds);           // operations per second

 private:
  struct scratch;
  std::mutex turn_;
  std::vector<thread_place> places_;
  thread_pool pool_;
  std::unique_ptr<scratch> scratch_;
};

}  // namespace kt
