// A straight line of operations on arrays, run without Python: what a graph has between operations that are not here.
//
// Arrays are views of memory, with any strides. Operations that only look at memory in another way move nothing; those
// that compute write to memory of the program's own, or, where the result or a view of it leaves the program, to memory
// that the caller allocates.
#pragma once
#include <kt/context.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace kt {

struct isa;

enum class element : std::uint8_t { f32, f16, bf16, i64, boolean, i32, i8 };
constexpr std::size_t size_of(element e) {
  switch (e) {
    case element::i64: return 8;
    case element::f32:
    case element::i32: return 4;
    case element::boolean:
    case element::i8: return 1;
    default: return 2;
  }
}

constexpr int most_dimensions = 6;

struct array {
  char* data = nullptr;
  element type = element::f32;
  int rank = 0;
  std::int64_t shape[most_dimensions] = {}, strides[most_dimensions] = {};  // in elements
  int source = 0;  // memory that was allocated for results, by number; -1 - i: that of argument i; `own`: the program's

  static constexpr int own = 1 << 30;
  std::int64_t count() const;
  bool contiguous() const;
};

// Numbers are constants, or arguments of a call: `slot` is which, or -1.
struct whole_number {
  std::int64_t value = 0;
  int slot = -1;
};
struct real_number {
  double value = 0;
  int slot = -1;
};

// Arrays are `in` and `out`, numbers `n` and `x`.
enum class opcode : std::uint8_t {
  // Views.
  reshape,    // n: the shape, of which one may be -1; copies where it must
  transpose,  // n: two dimensions
  unsqueeze,  // n: before which dimension
  squeeze,    // n: which dimension, of size 1
  select,     // n: dimension, index
  slice,      // n: dimension, begin, end; as Python's
  expand,     // n: the shape, -1 where it stays
  contiguous,
  // Computations.
  linear,            // in: x. A packed weight
  head_linear,       // in: x, whose last dimension but one is that of heads. A packed weight of each head
  moe,               // in: x, ids, weights. Packed experts
  norm,              // in: x, weight. n: round_first. x: epsilon, offset
  add_norm,          // in: x, addend, weight. out: sum, norm. As norm
  rotary,            // in: x, cos, sin and perhaps the weight of a norm. As norm
  attention,         // in: query, key, value and perhaps mask, sinks. n: causal, first position or -1, window or 0,
                     // which of mask (1) and sinks (2) there are. x: scale or 0, softcap or 0
  cached_attention,  // in: blocks of keys, of values, perhaps their scales; query, key, perhaps value; slots, block
                     // table, lengths, query starts, perhaps sinks. Keys and values are stored first; without a value
                     // blocks of values are a part of those of keys. n: window or 0, which of scales (1), sinks (2) and
                     // value (4) there are. x: scale or 0, softcap or 0
  elementwise,   // in: a and perhaps b, of shapes that torch would broadcast; a may be integers that are made floats.
                 // n: element_op, element of out. x: perhaps b, as a number
  integers,      // in: a and perhaps b, i64 or booleans, of such shapes. n: integer_op and perhaps b, as a number
  add_number,    // in: into, i64, which is written to. n: what is added
  arange,        // n: begin, end. out: i64
  embedding,     // in: a table of rows, i64. Throws std::out_of_range
  softmax,       // in: x; over the last dimension, to f32
  top_k,         // in: x, f32. n: k. out: values, ids, descending; of equal ones the first
  row_sum,       // in: x, f32; over the last dimension, which stays with size 1
  concat,        // in: all. n: dimension
  index_select,  // in: x, indices. n: dimension
  index_copy,    // in: into, indices, from. n: dimension. `into` is written to
};

// Those from `le` on give booleans; `conjunction` is of booleans.
enum class integer_op : std::uint8_t { add, sub, mul, le, lt, ge, gt, conjunction };

struct result {
  int source;           // as of an array
  std::int64_t offset;  // from there, in elements
  std::vector<std::int64_t> shape, strides;
};

class program {
 public:
  explicit program(int arguments);
  ~program();

  // Returns the first of the numbers of its `outs` arrays. packed: which packed weight or experts, or -1.
  int add(opcode op, std::vector<int> in, int outs, std::vector<whole_number> n, std::vector<real_number> x,
          int packed);
  // Which arrays leave the program; the last thing that is told.
  void finish(std::vector<int> results);

  // heads: how many weights there are, each with so many features and inputs.
  void set_linear(int packed, const packed_weight* weight, std::size_t features, std::size_t k, int heads,
                  const isa* i);
  void set_experts(int packed, const experts* e, const isa* i);

  // Memory for a new array, contiguous, of this shape.
  using allocator = std::function<void*(element, const std::int64_t* shape, int rank)>;
  // Calls from several threads take turns. Throws std::invalid_argument.
  std::vector<result> run(context& c, const kernel_table& kernels, const std::vector<array>& arguments,
                          const std::vector<std::int64_t>& whole, const std::vector<double>& real,
                          const allocator& allocate);

 private:
  struct step;
  struct packed;
  struct call;
  int arguments_;
  int arrays_;
  std::vector<step> steps_;
  std::vector<packed> packed_;
  std::vector<int> results_;
  std::vector<int> group_;              // of each array: those that may share memory
  std::vector<bool> leaves_;            // of each group
  std::vector<std::vector<int>> ends_;  // groups whose last use is a step
  std::vector<buffer> free_;
  std::mutex turn_;
};

}  // namespace kt
