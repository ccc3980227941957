// The experts of one MoE layer, packed.
#pragma once
#include <kt/buffer.h>
#include <kt/kernels.h>

#include <cstddef>

namespace kt {

// Element (expert, n, k) of a weight: n is the output feature, k the input feature. Strides in elements.
struct weight_view {
  void* data = nullptr;
  dtype type = dtype::f32;
  std::ptrdiff_t stride_expert = 0, stride_n = 0, stride_k = 0;
};

// Element (expert, n) of a bias.
struct bias_view {
  const void* data = nullptr;  // null: no bias
  dtype type = dtype::f32;
  std::ptrdiff_t stride_expert = 0, stride_n = 0;
};

struct experts_shape {
  int num_experts = 0;
  std::size_t hidden_size = 0, intermediate_size = 0;
  activation_spec act;
  // Gated: gate column i is row i of gate_up, up column i is row intermediate_size + i; interleaved: 2i and 2i + 1.
  bool interleaved = false;
};

// One weight of all experts: panels of 32 columns over a padded K.
struct packed_weight {
  buffer data;
  buffer bias;  // fp32 [expert][panel][32]; empty: none
  dtype format = dtype::bf16;
  std::size_t panels = 0, k = 0;  // per expert; k is padded

  std::size_t panel_bytes() const { return k * panel_columns * size_of(format); }
  const char* panel(std::size_t expert, std::size_t p) const {
    return data.as<const char>((expert * panels + p) * panel_bytes());
  }
  const float* panel_bias(std::size_t expert, std::size_t p) const {
    return bias.bytes() ? bias.as<const float>() + (expert * panels + p) * panel_columns : nullptr;
  }
};

class thread_pool;

struct experts {
  experts_shape shape;
  packed_weight gate_up, down;

  experts(const experts_shape& shape, dtype format);  // zeroed weights

  // One expert at a time, so that the source of each can be freed as soon as it has been read.
  void pack(int expert, const weight_view& gate_up_source, const weight_view& down_source);
  void pack_bias(const bias_view& gate_up_source, const bias_view& down_source);
  // Writes the weights of one expert back to where `pack` would read them from.
  void unpack(int expert, const weight_view& gate_up_target, const weight_view& down_target) const;
  std::size_t bytes() const;
};

}  // namespace kt
