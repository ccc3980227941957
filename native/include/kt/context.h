// The forward passes: an MoE layer, a linear layer; and the threads and memory that they need.
#pragma once
#include <kt/experts.h>
#include <kt/norm.h>
#include <kt/thread_pool.h>

#include <cstdint>
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

// in [rows][k], out [rows][features], both of `type`; strides of rows in elements.
struct linear_arguments {
  std::size_t rows = 0, k = 0, features = 0;
  const void* in = nullptr;
  dtype type = dtype::f32;
  std::size_t in_stride = 0;
  void* out = nullptr;
  std::size_t out_stride = 0;
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

  // out[r] = weight * in[r] + bias. `weight` is of one expert.
  void linear(const packed_weight& weight, const kernel_table& kernels, const linear_arguments& arguments);

  // Normalises rows, kt/norm.h.
  void norm(const kernel_table& kernels, const norm_job& job, std::size_t rows);

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
