// The experts of one MoE layer, packed.
#pragma once
#include <kt/kernels.h>
#include <kt/packed.h>

#include <cstddef>
#include <vector>

namespace kt {

struct experts_shape {
  int num_experts = 0;
  std::size_t hidden_size = 0, intermediate_size = 0;
  activation_spec act;
  // Gated: gate column i is row i of gate_up, up column i is row intermediate_size + i; interleaved: 2i and 2i + 1.
  bool interleaved = false;
};

// A slice of the intermediate dimension: its columns of gate_up and its rows of K of down.
struct expert_slice {
  packed_weight gate_up, down;
};

struct experts {
  experts_shape shape;
  weight_format format;
  std::vector<expert_slice> slices;  // one for each node of memory
  // Tokens that each expert was given, ever; read and added to atomically.
  mutable std::vector<std::uint64_t> tokens;

  // `nodes`: where the slices lie; -1 is anywhere.
  experts(const experts_shape& shape, const weight_format& format, const std::vector<int>& nodes = {-1});
  experts(experts&&) = default;

  template <class View>
  void pack(int expert, const View& gate_up, const View& down) {
    for (expert_slice& s : slices) {
      s.gate_up.pack(expert, gate_up);
      s.down.pack(expert, down);
    }
  }
  void pack_bias(const bias_view& gate_up, const bias_view& down);
  void unpack(int expert, const weight_view& gate_up, const weight_view& down) const;
  std::size_t bytes() const;
  std::size_t expert_bytes() const;  // of one expert's weights

  // Takes over expert `from_expert` of `from`. Throws std::invalid_argument unless both have the same shape, format and
  // slices; the numbers of experts may differ.
  void copy(int expert, const experts& from, int from_expert);
  // An expert as its bytes: of each slice gate_up, its bias, down and its bias, as long as `parts` says; a bias that is
  // not there has none. Of what was read, `write` takes over the weights.
  std::vector<std::size_t> parts() const;
  void read(int expert, char* to) const;
  void write(int expert, const char* from);
  // The memory of all experts: of each slice gate_up, its bias, down and its bias, of which one that is not there is
  // empty. `map` reads from such memory of another from now on (packed_weight::map), and throws std::invalid_argument
  // unless it is as long as that of these experts, biases aside, which may be there or not.
  std::vector<region> memory() const;
  void map(const std::vector<region>& memory);
  bool mapped() const { return slices.front().gate_up.mapped(); }
  void fill(int expert, unsigned char byte);  // with what is no number, where nothing may be read
  void release(int expert) const;             // gives its memory back until it is packed or copied to again
};

}  // namespace kt
