// Runs a program: one step after the other, each on the threads of the context.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "program_call.h"

namespace kt {
namespace {

void top_k(const float* in, std::int64_t stride, std::int64_t size, std::int64_t k, float* values, std::int64_t* ids,
           std::size_t begin, std::size_t end) {
  const auto before = [](float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
  for (std::size_t row = begin; row < end; ++row) {
    const float* x = in + static_cast<std::int64_t>(row) * stride;
    float* best = values + static_cast<std::int64_t>(row) * k;
    std::int64_t* id = ids + static_cast<std::int64_t>(row) * k;
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      if (found == k && !before(x[i], best[k - 1])) continue;
      std::int64_t at = found < k ? found++ : k - 1;
      for (; at > 0 && before(x[i], best[at - 1]); --at) best[at] = best[at - 1], id[at] = id[at - 1];
      best[at] = x[i];
      id[at] = i;
    }
  }
}

}  // namespace

void program::call::reshape(const step& s) {
  array a = in(s, 0);
  std::vector<std::int64_t> shape;
  std::int64_t known = 1;
  for (std::size_t i = 0; i < s.n.size(); ++i) {
    shape.push_back(number(s, i));
    if (shape.back() >= 0) known *= shape.back();
  }
  for (std::int64_t& size : shape)
    if (size < 0) size = known ? a.count() / known : 0;
  if (std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()) != a.count())
    fail_program("a shape has another number of elements");
  if (view(a, shape)) {
    out(s) = a;
    return;
  }
  array& b = place(s, 0, a.type, a.shape, a.rank);
  copy(c, a, b);
  view(b, shape);
}

void program::call::compute_linear(const step& s) {
  const packed& w = p.packed_[static_cast<std::size_t>(s.packed)];
  array a = in(s, 0);
  const bool of_heads = s.op == opcode::head_linear;
  if (a.rank < 1 + of_heads || a.shape[a.rank - 1] != static_cast<std::int64_t>(w.k) ||
      w.heads != (of_heads ? a.shape[a.rank - 2] : 1))
    fail_program("a linear layer has other inputs");
  const auto of_one_head = [&] { return of_heads ? without(a, a.rank - 2) : a; };
  std::int64_t stride;
  if (!as_rows(of_one_head(), stride)) {
    a = dense(s, a);
    stride = w.heads * a.shape[a.rank - 1];
  }
  std::int64_t shape[most_dimensions];
  std::copy(a.shape, a.shape + a.rank, shape);
  shape[a.rank - 1] = static_cast<std::int64_t>(w.features);
  const array& b = place(s, 0, a.type, shape, a.rank);
  const auto heads = static_cast<std::size_t>(w.heads);
  c.linear(*w.weight, kernels_for(*w.set, w.weight->layout().format.kind, float_type(a)),
           {static_cast<std::size_t>(rows_of(of_one_head())), w.k, w.features, a.data, float_type(a),
            static_cast<std::size_t>(stride), b.data, heads * w.features, heads,
            of_heads ? static_cast<std::size_t>(a.strides[a.rank - 2]) : 0, w.features});
}

void program::call::compute_moe(const step& s) {
  const packed& w = p.packed_[static_cast<std::size_t>(s.packed)];
  array x = in(s, 0);
  const array ids = dense(s, in(s, 1)), weights = dense(s, in(s, 2));
  if (x.rank != 2 || ids.rank != 2 || weights.rank != 2) fail_program("experts have rows of more dimensions");
  if (x.shape[1] != static_cast<std::int64_t>(w.all->shape.hidden_size)) fail_program("experts have other inputs");
  if (ids.type != element::i64 || ids.shape[0] != x.shape[0] || weights.count() != ids.count())
    fail_program("ids, weights and rows of experts do not fit");
  if (x.strides[1] != 1) x = dense(s, x);
  const array& b = place(s, 0, x.type, x.shape, 2);
  const std::string wrong = c.moe(*w.all, kernels_for(*w.set, w.all->format.kind, float_type(x)),
                                  {static_cast<std::size_t>(x.shape[0]), static_cast<int>(ids.shape[1]), x.data,
                                   float_type(x), static_cast<std::size_t>(x.strides[0]), ids.data, id_type::i64,
                                   weights.data, float_type(weights), b.data, static_cast<std::size_t>(b.strides[0])});
  if (!wrong.empty()) throw std::invalid_argument(wrong);
}

void program::call::compute_norm(const step& s, bool add) {
  const array weight = dense(s, in(s, add ? 2 : 1)), x = dense(s, in(s, 0));
  if (!x.rank || weight.rank != 1 || weight.shape[0] != x.shape[x.rank - 1]) fail_program("a norm has other inputs");
  const std::int64_t size = x.shape[x.rank - 1];
  norm_job job{};
  job.in = x.data;
  if (add) {
    const array addend = dense(s, in(s, 1));
    if (addend.count() != x.count() || addend.type != x.type) fail_program("addends differ");
    job.addend = addend.data;
    job.sum = place(s, 0, x.type, x.shape, x.rank).data;
  }
  job.out = place(s, add, x.type, x.shape, x.rank).data;
  job.row_stride = job.out_row_stride = size;
  job.rows = std::max<std::size_t>(1, static_cast<std::size_t>(rows_of(x)));
  job.type = float_type(x);
  job.size = static_cast<std::size_t>(size);
  job.weight = {weight.data, float_type(weight), static_cast<float>(real_number_of(s, 1)),
                static_cast<float>(real_number_of(s, 0)), number(s, 0) != 0};
  c.norm(k, job, static_cast<std::size_t>(rows_of(x)));
}

void program::call::compute_rows(const step& s) {
  array a = in(s, 0);
  if (!a.rank) fail_program("an operation on rows has been given a number");
  std::int64_t stride;
  if (!as_rows(a, stride)) {
    a = dense(s, a);
    as_rows(a, stride);
  }
  const std::int64_t size = a.shape[a.rank - 1];
  const auto rows = static_cast<std::size_t>(rows_of(a)), elements = static_cast<std::size_t>(size);
  if (s.op == opcode::softmax) {
    const array& b = place(s, 0, element::f32, a.shape, a.rank);
    const softmax_job job{a.data, float_type(a), stride, reinterpret_cast<float*>(b.data), elements};
    return c.each_row(rows, elements, [&](std::size_t begin, std::size_t end) { k.softmax(job, begin, end); });
  }
  if (a.type != element::f32) fail_program("an operation on rows is of f32 alone");
  const auto* in_rows = reinterpret_cast<const float*>(a.data);
  array shape = a;
  if (s.op == opcode::top_k) {
    const std::int64_t n = number(s, 0);
    if (n < 1 || n > size) fail_program("top_k of " + std::to_string(n) + " among " + std::to_string(size));
    shape.shape[a.rank - 1] = n;
    auto* values = reinterpret_cast<float*>(place(s, 0, element::f32, shape.shape, a.rank).data);
    auto* ids = reinterpret_cast<std::int64_t*>(place(s, 1, element::i64, shape.shape, a.rank).data);
    return c.each_row(rows, elements, [&](std::size_t begin, std::size_t end) {
      top_k(in_rows, stride, size, n, values, ids, begin, end);
    });
  }
  shape.shape[a.rank - 1] = 1;
  auto* sums = reinterpret_cast<float*>(place(s, 0, element::f32, shape.shape, a.rank).data);
  c.each_row(rows, elements, [&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      const float* x = in_rows + static_cast<std::int64_t>(row) * stride;
      sums[row] = std::accumulate(x, x + size, 0.0f);
    }
  });
}

void program::call::concat(const step& s) {
  array shape = in(s, 0);
  const int d = dimension(shape, number(s, 0));
  for (std::size_t i = 1; i < s.in.size(); ++i) {
    const array& a = in(s, i);
    if (a.type != shape.type || a.rank != shape.rank) fail_program("arrays that are joined differ");
    shape.shape[d] += a.shape[d];
  }
  const array b = place(s, 0, shape.type, shape.shape, shape.rank);
  std::int64_t at = 0;
  for (std::size_t i = 0; i < s.in.size(); ++i) {
    const array& a = in(s, i);
    copy(c, a, sliced(b, d, at, at + a.shape[d]));
    at += a.shape[d];
  }
}

void program::call::index_select(const step& s) {
  const array& a = in(s, 0);
  const array indices = dense(s, in(s, 1));
  const int d = dimension(a, number(s, 0));
  if (indices.type != element::i64 || indices.rank != 1) fail_program("indices are of another kind");
  const auto* at = reinterpret_cast<const std::int64_t*>(indices.data);
  array shape = a;
  shape.shape[d] = indices.shape[0];
  const array b = place(s, 0, a.type, shape.shape, shape.rank);
  for (std::int64_t i = 0; i < indices.shape[0]; ++i) {
    const std::int64_t from = at[i] < 0 ? at[i] + a.shape[d] : at[i];
    if (from < 0 || from >= a.shape[d])
      fail_program("index " + std::to_string(at[i]) + " of " + std::to_string(a.shape[d]));
    copy(c, sliced(a, d, from, from + 1), sliced(b, d, i, i + 1));
  }
}

void program::call::index_copy(const step& s) {
  const array into = in(s, 0), indices = dense(s, in(s, 1)), from = in(s, 2);
  const int d = dimension(into, number(s, 0));
  if (indices.type != element::i64 || indices.count() != from.shape[d] || from.rank != into.rank ||
      from.type != into.type)
    fail_program("what is copied by index does not fit");
  const auto* at = reinterpret_cast<const std::int64_t*>(indices.data);
  for (std::int64_t i = 0; i < from.shape[d]; ++i) {
    if (at[i] < 0 || at[i] >= into.shape[d])
      fail_program("index " + std::to_string(at[i]) + " of " + std::to_string(into.shape[d]));
    std::int64_t run = 1;  // indices that follow one another are one copy
    while (i + run < from.shape[d] && at[i + run] == at[i] + run && at[i + run] < into.shape[d]) ++run;
    copy(c, sliced(from, d, i, i + run), sliced(into, d, at[i], at[i] + run));
    i += run - 1;
  }
  out(s) = into;
}

void program::call::run(const step& s) {
  switch (s.op) {
    case opcode::reshape: return reshape(s);
    case opcode::transpose: {
      array a = in(s, 0);
      const int i = dimension(a, number(s, 0)), j = dimension(a, number(s, 1));
      std::swap(a.shape[i], a.shape[j]);
      std::swap(a.strides[i], a.strides[j]);
      out(s) = a;
      return;
    }
    case opcode::unsqueeze: {
      const array& a = in(s, 0);
      const int d = dimension(a, number(s, 0), 1);
      if (a.rank == most_dimensions) fail_program("too many dimensions");
      array b = a;
      ++b.rank;
      for (int i = a.rank; i > d; --i) b.shape[i] = a.shape[i - 1], b.strides[i] = a.strides[i - 1];
      b.strides[d] = d < a.rank ? a.shape[d] * a.strides[d] : 1;
      b.shape[d] = 1;
      out(s) = b;
      return;
    }
    case opcode::squeeze: {
      const array& a = in(s, 0);
      const int d = dimension(a, number(s, 0));
      out(s) = a.shape[d] == 1 ? without(a, d) : a;
      return;
    }
    case opcode::select: {
      const array& a = in(s, 0);
      const int d = dimension(a, number(s, 0));
      const std::int64_t index = number(s, 1);
      if (index < -a.shape[d] || index >= a.shape[d]) fail_program("an index is out of range");
      out(s) = selected(a, d, index < 0 ? index + a.shape[d] : index);
      return;
    }
    case opcode::slice: {
      const array& a = in(s, 0);
      out(s) = sliced(a, dimension(a, number(s, 0)), number(s, 1), number(s, 2));
      return;
    }
    case opcode::expand: {
      std::int64_t shape[most_dimensions];
      const array& a = in(s, 0);
      const int rank = static_cast<int>(s.n.size());
      for (int i = 0; i < rank; ++i) {
        shape[i] = number(s, static_cast<std::size_t>(i));
        const int j = i - rank + a.rank;
        if (shape[i] < 0 && j >= 0) shape[i] = a.shape[j];
      }
      out(s) = expanded(a, shape, rank);
      return;
    }
    case opcode::contiguous: {
      const array a = in(s, 0);
      if (a.contiguous()) {
        out(s) = a;
        return;
      }
      copy(c, a, place(s, 0, a.type, a.shape, a.rank));
      return;
    }
    case opcode::linear:
    case opcode::head_linear: return compute_linear(s);
    case opcode::moe: return compute_moe(s);
    case opcode::norm: return compute_norm(s, false);
    case opcode::add_norm: return compute_norm(s, true);
    case opcode::rotary: return compute_rotary(s);
    case opcode::attention: return compute_attention(s);
    case opcode::cached_attention: return compute_cached_attention(s);
    case opcode::elementwise: return compute_elementwise(s);
    case opcode::integers: return compute_integers(s);
    case opcode::add_number: return add_number(s);
    case opcode::arange: return arange(s);
    case opcode::embedding: return embedding(s);
    case opcode::softmax:
    case opcode::top_k:
    case opcode::row_sum: return compute_rows(s);
    case opcode::concat: return concat(s);
    case opcode::index_select: return index_select(s);
    case opcode::index_copy: return index_copy(s);
  }
}

program::program(int arguments) : arguments_(arguments), arrays_(arguments) {}
program::~program() = default;

int program::add(opcode op, std::vector<int> in, int outs, std::vector<whole_number> n, std::vector<real_number> x,
                 int packed) {
  for (const int i : in)
    if (i < 0 || i >= arrays_) fail_program("array " + std::to_string(i) + " of " + std::to_string(arrays_));
  if (packed >= static_cast<int>(packed_.size())) packed_.resize(static_cast<std::size_t>(packed) + 1);
  steps_.push_back({op, std::move(in), arrays_, outs, std::move(n), std::move(x), packed});
  arrays_ += outs;
  return arrays_ - outs;
}

void program::finish(std::vector<int> results) {
  results_ = std::move(results);
  const auto arrays = static_cast<std::size_t>(arrays_);
  group_.resize(arrays);
  std::iota(group_.begin(), group_.end(), 0);
  std::vector<int> last(arrays, -1);
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const step& s = steps_[i];
    if (s.op <= opcode::contiguous || s.op == opcode::index_copy ||
        s.op == opcode::add_number)  // may be a view of its first operand
      group_[static_cast<std::size_t>(s.out)] = group_[static_cast<std::size_t>(s.in[0])];
    for (const int a : s.in) last[static_cast<std::size_t>(group_[static_cast<std::size_t>(a)])] = static_cast<int>(i);
    for (int o = s.out; o < s.out + s.outs; ++o)
      last[static_cast<std::size_t>(group_[static_cast<std::size_t>(o)])] = static_cast<int>(i);
  }
  leaves_.assign(arrays, false);
  for (const int r : results_) leaves_[static_cast<std::size_t>(group_[static_cast<std::size_t>(r)])] = true;
  ends_.resize(steps_.size());
  for (std::size_t g = 0; g < arrays; ++g)
    if (last[g] >= 0) ends_[static_cast<std::size_t>(last[g])].push_back(static_cast<int>(g));
}

void program::set_linear(int packed, const packed_weight* weight, std::size_t features, std::size_t k, int heads,
                         const isa* i) {
  packed_.at(static_cast<std::size_t>(packed)) = {weight, features, k, heads, nullptr, i};
}

void program::set_experts(int packed, const experts* e, const isa* i) {
  packed_.at(static_cast<std::size_t>(packed)) = {nullptr, 0, 0, 1, e, i};
}

std::vector<result> program::run(context& c, const kernel_table& kernels, const std::vector<array>& arguments,
                                 const std::vector<std::int64_t>& whole, const std::vector<double>& real,
                                 const allocator& allocate) {
  if (static_cast<int>(arguments.size()) != arguments_) fail_program("another number of arguments");
  const std::lock_guard lock(turn_);
  call now{*this, c, kernels, whole, real, allocate, std::vector<array>(static_cast<std::size_t>(arrays_)), {}, {}};
  now.memory.resize(static_cast<std::size_t>(arrays_));
  std::copy(arguments.begin(), arguments.end(), now.arrays.begin());
  for (int i = 0; i < arguments_; ++i) now.arrays[static_cast<std::size_t>(i)].source = -1 - i;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    now.run(steps_[i]);
    for (const int g : ends_[i]) {
      std::vector<buffer>& own = now.memory[static_cast<std::size_t>(g)];
      std::move(own.begin(), own.end(), std::back_inserter(free_));
      own.clear();
    }
  }
  // Steps of decode find their memory again; that of a long prompt is given back.
  constexpr std::size_t most_kept = std::size_t{64} << 20;
  std::size_t kept = 0;
  for (const buffer& b : free_) kept += b.bytes();
  if (kept > most_kept) free_.clear();
  std::vector<result> found;
  for (const int r : results_) {
    const array& a = now.arrays[static_cast<std::size_t>(r)];
    const char* base = a.source < 0 ? arguments[static_cast<std::size_t>(-1 - a.source)].data
                                    : now.given[static_cast<std::size_t>(a.source)];
    found.push_back({a.source,
                     (a.data - base) / static_cast<std::int64_t>(size_of(a.type)),
                     {a.shape, a.shape + a.rank},
                     {a.strides, a.strides + a.rank}});
  }
  return found;
}

}  // namespace kt
