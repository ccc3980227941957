// The forward pass of one MoE layer.
#pragma once
#include <kt/experts.h>
#include <kt/thread_pool.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

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

// Threads and the memory that a call needs besides its arguments. Calls from several threads take turns.
class context {
 public:
  explicit context(int threads);
  ~context();
  int threads() const;

  // out[t] = sum over slots, in ascending order of expert, of weights[t][s] * expert(ids[t][s])(hidden[t]).
  // Ids >= num_experts are skipped. Returns an empty string, or what is wrong with which argument: a negative id,
  // a weight that is no finite number.
  std::string moe(const experts& e, const kernel_table& kernels, const moe_arguments& arguments);

  // Measured ceilings of this machine with this context's threads.
  double read_bandwidth(const kernel_table& kernels, std::size_t bytes, int repeats);  // bytes per second
  double arithmetic(const kernel_table& kernels, int repeats);                         // flops per second

 private:
  struct scratch;
  std::mutex turn_;
  thread_pool pool_;
  std::unique_ptr<scratch> scratch_;
};

}  // namespace kt
