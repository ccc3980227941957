// Runs a program: one step after the other, each on the threads of the context.
#include <kt/isa.h>
#include <kt/program.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("program: " + what); }

dtype float_type(const array& a) {
  if (a.type > element::bf16) fail("an operation on floats has been given integers");
  return static_cast<dtype>(a.type);
}

int dimension(const array& a, std::int64_t d, int extra = 0) {
  const std::int64_t rank = a.rank + extra, i = d < 0 ? d + rank : d;
  if (i < 0 || i >= rank) fail("dimension " + std::to_string(d) + " of " + std::to_string(rank));
  return static_cast<int>(i);
}

void set_contiguous(array& a) {
  std::int64_t stride = 1;
  for (int i = a.rank - 1; i >= 0; --i) {
    a.strides[i] = stride;
    stride *= std::max<std::int64_t>(1, a.shape[i]);
  }
}

array without(const array& a, int d) {
  array b = a;
  --b.rank;
  for (int i = d; i < b.rank; ++i) b.shape[i] = a.shape[i + 1], b.strides[i] = a.strides[i + 1];
  return b;
}

array selected(const array& a, int d, std::int64_t index) {
  array b = without(a, d);
  b.data = a.data + index * a.strides[d] * static_cast<std::int64_t>(size_of(a.type));
  return b;
}

array sliced(const array& a, int d, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = a.shape[d];
  const auto inside = [size](std::int64_t i) { return std::clamp<std::int64_t>(i < 0 ? i + size : i, 0, size); };
  begin = inside(begin);
  array b = a;
  b.shape[d] = std::max<std::int64_t>(0, inside(end) - begin);
  b.data = a.data + begin * a.strides[d] * static_cast<std::int64_t>(size_of(a.type));
  return b;
}

// Gives `a` another shape without moving anything; returns whether that can be.
bool view(array& a, const std::vector<std::int64_t>& shape) {
  array b = a;
  b.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), b.shape);
  if (a.contiguous() || a.count() == 0) {
    set_contiguous(b);
    a = b;
    return true;
  }
  // Dimensions of `a` that lie behind one another are cut anew, from the last on.
  array from = a;
  from.rank = 0;
  for (int i = 0; i < a.rank; ++i) {
    if (a.shape[i] == 1) continue;
    from.shape[from.rank] = a.shape[i];
    from.strides[from.rank++] = a.strides[i];
  }
  int to = b.rank - 1;
  for (int last = from.rank - 1; last >= 0;) {
    int first = last;
    std::int64_t together = from.shape[last];
    while (first > 0 && from.strides[first - 1] == from.strides[first] * from.shape[first])
      together *= from.shape[--first];
    std::int64_t stride = from.strides[last], taken = 1;
    while (to >= 0 && (taken < together || b.shape[to] == 1)) {
      b.strides[to] = stride;
      stride *= b.shape[to];
      taken *= b.shape[to];
      --to;
    }
    if (taken != together) return false;
    last = first - 1;
  }
  for (; to >= 0; --to) {
    if (b.shape[to] != 1) return false;
    b.strides[to] = 1;
  }
  a = b;
  return true;
}

// The rows of the last dimension `stride` elements apart.
bool as_rows(const array& a, std::int64_t& stride) {
  if (a.rank && a.shape[a.rank - 1] != 1 && a.strides[a.rank - 1] != 1) return false;
  stride = 0;
  std::int64_t next = -1;
  for (int i = a.rank - 2; i >= 0; --i) {
    if (a.shape[i] == 1) continue;
    if (next < 0)
      stride = a.strides[i];
    else if (a.strides[i] != next)
      return false;
    next = a.strides[i] * a.shape[i];
  }
  return true;
}

std::int64_t rows_of(const array& a) { return a.rank && a.shape[a.rank - 1] ? a.count() / a.shape[a.rank - 1] : 0; }

// Elements of `from` to those of `to`, which has the same shape.
void copy(context& c, array from, array to) {
  if (!from.count()) return;
  int rank = 0;  // without dimensions of 1, those that lie behind one another in both as one
  for (int i = 0; i < from.rank; ++i) {
    if (from.shape[i] == 1) continue;
    if (rank && from.strides[rank - 1] == from.strides[i] * from.shape[i] &&
        to.strides[rank - 1] == to.strides[i] * to.shape[i]) {
      from.shape[rank - 1] *= from.shape[i];
    } else {
      from.shape[rank] = from.shape[i];
      ++rank;
    }
    from.strides[rank - 1] = from.strides[i];
    to.strides[rank - 1] = to.strides[i];
  }
  const std::size_t bytes = size_of(from.type);
  const std::int64_t size = rank ? from.shape[rank - 1] : 1;
  const std::int64_t step = rank ? from.strides[rank - 1] : 1, to_step = rank ? to.strides[rank - 1] : 1;
  std::int64_t rows = 1;
  for (int i = 0; i < rank - 1; ++i) rows *= from.shape[i];
  c.each_row(static_cast<std::size_t>(rows), static_cast<std::size_t>(size), [&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      std::int64_t left = static_cast<std::int64_t>(row), a = 0, b = 0;
      for (int i = rank - 2; i >= 0; --i) {
        a += left % from.shape[i] * from.strides[i];
        b += left % from.shape[i] * to.strides[i];
        left /= from.shape[i];
      }
      const char* source = from.data + a * static_cast<std::int64_t>(bytes);
      char* target = to.data + b * static_cast<std::int64_t>(bytes);
      if (step == 1 && to_step == 1) {
        std::memcpy(target, source, static_cast<std::size_t>(size) * bytes);
        continue;
      }
      for (std::int64_t i = 0; i < size; ++i)
        std::memcpy(target + i * to_step * static_cast<std::int64_t>(bytes),
                    source + i * step * static_cast<std::int64_t>(bytes), bytes);
    }
  });
}

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

std::int64_t array::count() const { return std::accumulate(shape, shape + rank, std::int64_t{1}, std::multiplies<>()); }

bool array::contiguous() const {
  std::int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

struct program::step {
  opcode op;
  std::vector<int> in;
  int out, outs;
  std::vector<whole_number> n;
  std::vector<real_number> x;
  int packed;
};

struct program::packed {
  const packed_weight* weight = nullptr;
  std::size_t features = 0, k = 0;
  const experts* all = nullptr;
  const isa* set = nullptr;
};

// One call: where its arrays are.
struct program::call {
  program& p;
  context& c;
  const kernel_table& k;
  const std::vector<std::int64_t>& whole;
  const std::vector<double>& real;
  const allocator& allocate;
  std::vector<array> arrays;
  std::vector<std::vector<buffer>> memory;  // of each group
  std::vector<const char*> given;           // by the allocator, in order

  std::int64_t number(const step& s, std::size_t i) const {
    const whole_number& n = s.n[i];
    return n.slot < 0 ? n.value : whole[static_cast<std::size_t>(n.slot)];
  }
  double real_number_of(const step& s, std::size_t i) const {
    const real_number& x = s.x[i];
    return x.slot < 0 ? x.value : real[static_cast<std::size_t>(x.slot)];
  }
  const array& in(const step& s, std::size_t i) const { return arrays[static_cast<std::size_t>(s.in[i])]; }
  array& out(const step& s, int i = 0) { return arrays[static_cast<std::size_t>(s.out + i)]; }

  buffer& take(int group, std::size_t bytes) {
    std::size_t best = p.free_.size();
    for (std::size_t i = 0; i < p.free_.size(); ++i)
      if (p.free_[i].bytes() >= bytes && (best == p.free_.size() || p.free_[i].bytes() < p.free_[best].bytes()))
        best = i;
    std::vector<buffer>& own = memory[static_cast<std::size_t>(group)];
    if (best == p.free_.size()) {
      own.emplace_back(std::max<std::size_t>(bytes, 1));
    } else {
      own.push_back(std::move(p.free_[best]));
      p.free_[best] = std::move(p.free_.back());
      p.free_.pop_back();
    }
    return own.back();
  }

  // Memory for a result of a step.
  array& place(const step& s, int i, element type, const std::int64_t* shape, int rank) {
    array a;
    a.type = type;
    a.rank = rank;
    std::copy(shape, shape + rank, a.shape);
    set_contiguous(a);
    const int group = p.group_[static_cast<std::size_t>(s.out + i)];
    if (p.leaves_[static_cast<std::size_t>(group)]) {
      a.data = static_cast<char*>(allocate(type, shape, rank));
      a.source = static_cast<int>(given.size());
      given.push_back(a.data);
    } else {
      a.data = take(group, static_cast<std::size_t>(a.count()) * size_of(type)).as();
      a.source = array::own;
    }
    return out(s, i) = a;
  }

  // `a` itself if it is contiguous, else a copy in memory of the program, freed with a result of the step.
  array dense(const step& s, const array& a) {
    if (a.contiguous()) {
      array b = a;
      set_contiguous(b);
      return b;
    }
    array b = a;
    set_contiguous(b);
    b.data =
        take(p.group_[static_cast<std::size_t>(s.out)], static_cast<std::size_t>(b.count()) * size_of(b.type)).as();
    copy(c, a, b);
    return b;
  }

  void run(const step& s);
  void reshape(const step& s);
  void compute_linear(const step& s);
  void compute_moe(const step& s);
  void compute_norm(const step& s, bool add);
  void compute_rotary(const step& s);
  void compute_attention(const step& s);
  void compute_cached_attention(const step& s);
  void store_rows(const array& rows, const array& slots, const array& blocks, const array* scales);
  void compute_elementwise(const step& s);
  void compute_rows(const step& s);
  void concat(const step& s);
  void index_select(const step& s);
  void index_copy(const step& s);
};

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
    fail("a shape has another number of elements");
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
  if (!a.rank || a.shape[a.rank - 1] != static_cast<std::int64_t>(w.k)) fail("a linear layer has other inputs");
  std::int64_t stride;
  if (!as_rows(a, stride)) {
    a = dense(s, a);
    stride = a.shape[a.rank - 1];
  }
  std::int64_t shape[most_dimensions];
  std::copy(a.shape, a.shape + a.rank, shape);
  shape[a.rank - 1] = static_cast<std::int64_t>(w.features);
  const array& b = place(s, 0, a.type, shape, a.rank);
  c.linear(*w.weight, kernels_for(*w.set, w.weight->layout().format.kind, float_type(a)),
           {static_cast<std::size_t>(rows_of(a)), w.k, w.features, a.data, float_type(a),
            static_cast<std::size_t>(stride), b.data, w.features});
}

void program::call::compute_moe(const step& s) {
  const packed& w = p.packed_[static_cast<std::size_t>(s.packed)];
  array x = in(s, 0);
  const array ids = dense(s, in(s, 1)), weights = dense(s, in(s, 2));
  if (x.rank != 2 || ids.rank != 2 || weights.rank != 2) fail("experts have rows of more dimensions");
  if (x.shape[1] != static_cast<std::int64_t>(w.all->shape.hidden_size)) fail("experts have other inputs");
  if (ids.type != element::i64 || ids.shape[0] != x.shape[0] || weights.count() != ids.count())
    fail("ids, weights and rows of experts do not fit");
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
  if (!x.rank || weight.rank != 1 || weight.shape[0] != x.shape[x.rank - 1]) fail("a norm has other inputs");
  const std::int64_t size = x.shape[x.rank - 1];
  norm_job job{};
  job.in = x.data;
  if (add) {
    const array addend = dense(s, in(s, 1));
    if (addend.count() != x.count() || addend.type != x.type) fail("addends differ");
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

void program::call::compute_rotary(const step& s) {
  array x = in(s, 0), cos = in(s, 1), sin = in(s, 2);
  if (x.rank != 4 || cos.rank != 3 || sin.rank != 3 || cos.type != x.type || sin.type != x.type)
    fail("heads and angles do not fit");
  if (x.strides[3] != 1) x = dense(s, x);
  cos = dense(s, cos);
  sin = dense(s, sin);
  const std::int64_t rotated = cos.shape[2];
  if (cos.shape[1] != x.shape[2] || (cos.shape[0] != 1 && cos.shape[0] != x.shape[0]) || rotated > x.shape[3] ||
      rotated % 2 || sin.count() != cos.count())
    fail("heads and angles do not fit");
  const std::int64_t shape[] = {x.shape[0], x.shape[2], x.shape[1], x.shape[3]};
  array& b = place(s, 0, x.type, shape, 4);
  rotary_job job{};
  job.in = x.data;
  job.out = b.data;
  const std::int64_t* from[] = {x.strides, b.strides};
  job.in_strides[0] = x.strides[0], job.in_strides[1] = x.strides[2], job.in_strides[2] = x.strides[1];
  std::copy(from[1], from[1] + 3, job.out_strides);
  job.positions = static_cast<std::size_t>(x.shape[2]);
  job.heads = static_cast<std::size_t>(x.shape[1]);
  job.type = float_type(x);
  job.size = static_cast<std::size_t>(x.shape[3]);
  job.rotated = static_cast<std::size_t>(rotated);
  job.cos = cos.data;
  job.sin = sin.data;
  job.angle_strides[0] = cos.shape[0] == 1 ? 0 : cos.strides[0];
  job.angle_strides[1] = cos.strides[1];
  if (s.in.size() > 3) {
    const array weight = dense(s, in(s, 3));
    if (weight.count() != x.shape[3]) fail("a norm of heads has another size");
    job.norm = {weight.data, float_type(weight), static_cast<float>(real_number_of(s, 1)),
                static_cast<float>(real_number_of(s, 0)), number(s, 0) != 0};
  }
  c.rotary(k, job, static_cast<std::size_t>(x.count() / std::max<std::int64_t>(1, x.shape[3])));
  std::swap(b.shape[1], b.shape[2]);
  std::swap(b.strides[1], b.strides[2]);
}

void program::call::compute_attention(const step& s) {
  array q = in(s, 0), key = in(s, 1), value = in(s, 2);
  if (q.rank != 4 || key.rank != 4 || value.rank != 4) fail("attention has other dimensions");
  for (array* a : {&q, &key, &value})
    if (a->strides[3] != 1 && a->shape[3] != 1) *a = dense(s, *a);
  if (key.shape[1] == 0 || q.shape[1] % key.shape[1] || q.shape[3] != key.shape[3] || key.shape[2] != value.shape[2] ||
      key.shape[0] != q.shape[0] || key.type != value.type)
    fail("queries, keys and values do not fit");
  const std::int64_t shape[] = {q.shape[0], q.shape[2], q.shape[1], value.shape[3]};
  array& b = place(s, 0, q.type, shape, 4);
  std::swap(b.shape[1], b.shape[2]);
  std::swap(b.strides[1], b.strides[2]);
  const auto place_of = [](const array& a) {
    return attention_place{a.data, {a.strides[0], a.strides[1], a.strides[2]}};
  };
  attention_arguments a;
  a.sequences = static_cast<int>(q.shape[0]);
  a.query_heads = static_cast<int>(q.shape[1]);
  a.kv_heads = static_cast<int>(key.shape[1]);
  a.key_size = static_cast<std::size_t>(key.shape[3]);
  a.value_size = static_cast<std::size_t>(value.shape[3]);
  a.type = float_type(q);
  a.kv_type = float_type(key);
  a.query = place_of(q);
  a.key = place_of(key);
  a.value = place_of(value);
  a.out = b.data;
  a.out_strides = {b.strides[0], b.strides[1], b.strides[2]};
  a.queries = q.shape[2];
  a.positions = key.shape[2];
  a.block_size = 1;
  a.causal = number(s, 0) != 0;
  a.first = number(s, 1);
  a.window = number(s, 2);
  std::size_t next = 3;
  if (number(s, 3) & 1) {
    array mask = in(s, next++);
    array whole = q;
    whole.shape[3] = key.shape[2];
    if (mask.rank > 4) fail("a mask has more dimensions");
    if (mask.rank && mask.strides[mask.rank - 1] != 1) mask = dense(s, mask);
    array m = whole;
    for (int i = 0; i < 4; ++i) {
      const int from = i - (4 - mask.rank);
      if (from >= 0 && mask.shape[from] != 1 && mask.shape[from] != whole.shape[i]) fail("a mask does not fit");
      m.strides[i] = from < 0 || mask.shape[from] == 1 ? 0 : mask.strides[from];
    }
    if (whole.shape[3] != 1 && m.strides[3] != 1) fail("a mask has not all keys");
    a.mask = {mask.data, {m.strides[0], m.strides[1], m.strides[2]}};
    a.mask_kind = mask.type == element::boolean ? mask_type::boolean
                  : mask.type == element::f32   ? mask_type::f32
                  : mask.type == element::f16   ? mask_type::f16
                                                : mask_type::bf16;
  }
  if (number(s, 3) & 2) {
    const array sinks = dense(s, in(s, next));
    if (sinks.type != element::f32 || sinks.count() != q.shape[1]) fail("sinks do not fit");
    a.sinks = reinterpret_cast<const float*>(sinks.data);
  }
  const double scale = real_number_of(s, 0);
  a.scale = static_cast<float>(scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(a.key_size)));
  a.softcap = static_cast<float>(real_number_of(s, 1));
  c.attention(k, a);
}

// Rows [1, heads, tokens, size] into slots of blocks [blocks, positions, heads, size].
void program::call::store_rows(const array& rows, const array& slots, const array& blocks, const array* scales) {
  const auto* slot = reinterpret_cast<const std::int64_t*>(slots.data);
  const std::int64_t heads = rows.shape[1], tokens = rows.shape[2], size = rows.shape[3], positions = blocks.shape[1];
  for (std::int64_t t = 0; t < tokens; ++t)
    if (slot[t] >= blocks.shape[0] * positions) fail("slot " + std::to_string(slot[t]) + " is not in the storage");
  if (scales) {
    store_kv_arguments a;
    a.tokens = static_cast<std::size_t>(tokens);
    a.heads = static_cast<std::size_t>(heads);
    a.size = static_cast<std::size_t>(size);
    a.rows = rows.data;
    a.type = float_type(rows);
    a.token_stride = rows.strides[2];
    a.head_stride = rows.strides[1];
    a.slots = slot;
    a.block_size = positions;
    a.codes = reinterpret_cast<std::int8_t*>(blocks.data);
    a.code_strides = {blocks.strides[0], blocks.strides[2], blocks.strides[1]};
    a.scales = reinterpret_cast<float*>(scales->data);
    a.scale_strides = {scales->strides[0], scales->strides[2], scales->strides[1]};
    a.group = static_cast<std::size_t>(size / scales->shape[3]);
    return c.store_kv(k, a);
  }
  const auto bytes = static_cast<std::int64_t>(size_of(blocks.type));
  c.each_row(static_cast<std::size_t>(tokens), static_cast<std::size_t>(heads * size),
             [&](std::size_t begin, std::size_t end) {
               for (std::size_t t = begin; t < end; ++t) {
                 if (slot[t] < 0) continue;
                 const char* from = rows.data + static_cast<std::int64_t>(t) * rows.strides[2] * bytes;
                 char* to = blocks.data +
                            (slot[t] / positions * blocks.strides[0] + slot[t] % positions * blocks.strides[1]) * bytes;
                 for (std::int64_t h = 0; h < heads; ++h)
                   std::memcpy(to + h * blocks.strides[2] * bytes, from + h * rows.strides[1] * bytes,
                               static_cast<std::size_t>(size * bytes));
               }
             });
}

void program::call::compute_cached_attention(const step& s) {
  const bool coded = number(s, 1) & 1, with_sinks = number(s, 1) & 2;
  std::size_t next = 0;
  const array key_blocks = in(s, next++), value_blocks = in(s, next++);
  const array key_scales = coded ? in(s, next++) : array{}, value_scales = coded ? in(s, next++) : array{};
  array q = in(s, next++), key = in(s, next++), value = in(s, next++);
  const array slots = dense(s, in(s, next++)), table = dense(s, in(s, next++)), lengths = dense(s, in(s, next++)),
              starts = dense(s, in(s, next++));
  for (array* a : {&q, &key, &value}) {
    if (a->rank != 4 || a->shape[0] != 1) fail("tokens of a step are not one row");
    if (a->strides[3] != 1 && a->shape[3] != 1) *a = dense(s, *a);
  }
  const auto holds = [&](const array& blocks, const array& scales, const array& rows) {
    return blocks.rank == 4 && blocks.shape[1] > 0 && blocks.strides[3] == 1 && blocks.shape[2] == rows.shape[1] &&
           blocks.shape[3] == rows.shape[3] && rows.shape[2] == q.shape[2] &&
           (coded ? blocks.type == element::i8 && scales.type == element::f32 && scales.rank == 4 &&
                        scales.shape[3] > 0 && blocks.shape[3] % scales.shape[3] == 0 && scales.strides[3] == 1 &&
                        std::equal(scales.shape, scales.shape + 3, blocks.shape)
                  : blocks.type == rows.type);
  };
  if (!holds(key_blocks, key_scales, key) || !holds(value_blocks, value_scales, value) ||
      !std::equal(key_blocks.shape, key_blocks.shape + 3, value_blocks.shape))
    fail("keys or values do not fit into their storage");
  if (key.shape[1] == 0 || q.shape[1] % key.shape[1] || q.shape[3] != key.shape[3]) fail("queries and keys do not fit");
  if (slots.type != element::i64 || table.type != element::i32 || lengths.type != element::i64 ||
      starts.type != element::i64 || table.rank != 2 || slots.count() != q.shape[2] ||
      lengths.count() != table.shape[0] || starts.count() != table.shape[0] + 1)
    fail("what is said of a step's sequences does not fit");
  // Sequences without queries are often many, and at the end.
  const std::int64_t positions = key_blocks.shape[1], blocks = key_blocks.shape[0], tokens = q.shape[2];
  const auto* start = reinterpret_cast<const std::int64_t*>(starts.data);
  const auto* length = reinterpret_cast<const std::int64_t*>(lengths.data);
  const auto* block = reinterpret_cast<const std::int32_t*>(table.data);
  std::int64_t sequences = table.shape[0];
  while (sequences > 0 && start[sequences - 1] == start[sequences]) --sequences;
  if (start[0] != 0 || start[sequences] != tokens) fail("queries of a step are those of no sequence");
  for (std::int64_t i = 0; i < sequences; ++i) {
    const std::int64_t queries = start[i + 1] - start[i], used = (length[i] + positions - 1) / positions;
    if (queries < 0 || queries > length[i] || used > table.shape[1])
      fail("sequence " + std::to_string(i) + " has a length that cannot be");
    for (std::int64_t j = 0; j < used; ++j)
      if (const std::int32_t b = block[i * table.shape[1] + j]; b < 0 || b >= blocks)
        fail("block " + std::to_string(b) + " of " + std::to_string(blocks));
  }
  store_rows(key, slots, key_blocks, coded ? &key_scales : nullptr);
  store_rows(value, slots, value_blocks, coded ? &value_scales : nullptr);
  const std::int64_t shape[] = {1, tokens, q.shape[1], value.shape[3]};
  const array& out = place(s, 0, q.type, shape, 4);
  const auto in_blocks = [](const array& a) {
    return attention_place{a.data, {a.strides[0], a.strides[2], a.strides[1]}};
  };
  attention_arguments a;
  a.sequences = static_cast<int>(sequences);
  a.query_heads = static_cast<int>(q.shape[1]);
  a.kv_heads = static_cast<int>(key.shape[1]);
  a.key_size = static_cast<std::size_t>(key.shape[3]);
  a.value_size = static_cast<std::size_t>(value.shape[3]);
  a.type = float_type(q);
  a.kv_type = coded ? dtype::f32 : float_type(key_blocks);
  a.query = {q.data, {0, q.strides[1], q.strides[2]}};
  a.key = in_blocks(key_blocks);
  a.value = in_blocks(value_blocks);
  if (coded) {
    a.key_scales = {in_blocks(key_scales), static_cast<std::size_t>(key.shape[3] / key_scales.shape[3])};
    a.value_scales = {in_blocks(value_scales), static_cast<std::size_t>(value.shape[3] / value_scales.shape[3])};
  }
  a.out = out.data;
  a.out_strides = {0, out.strides[2], out.strides[1]};
  a.query_starts = start;
  a.lengths = length;
  a.block_table = block;
  a.table_stride = static_cast<std::size_t>(table.shape[1]);
  a.block_size = positions;
  a.causal = true;
  a.window = number(s, 0);
  if (with_sinks) {
    const array sinks = dense(s, in(s, next));
    if (sinks.type != element::f32 || sinks.count() != q.shape[1]) fail("sinks do not fit");
    a.sinks = reinterpret_cast<const float*>(sinks.data);
  }
  const double scale = real_number_of(s, 0);
  a.scale = static_cast<float>(scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(a.key_size)));
  a.softcap = static_cast<float>(real_number_of(s, 1));
  c.attention(k, a);
}

void program::call::compute_elementwise(const step& s) {
  const auto op = static_cast<element_op>(number(s, 0));
  const auto type = static_cast<element>(number(s, 1));
  array a = in(s, 0);
  std::int64_t a_stride, b_stride = 0;
  if (!as_rows(a, a_stride)) {
    a = dense(s, a);
    as_rows(a, a_stride);
  }
  elementwise_job job{};
  if (s.in.size() > 1) {
    array b = in(s, 1);
    job.b_single = b.count() == rows_of(a) && b.count() != a.count();
    if (b.type != a.type || (!job.b_single && b.count() != a.count())) fail("operands do not fit");
    b = dense(s, b);
    b_stride = job.b_single ? 1 : a.shape[a.rank - 1];
    job.b = b.data;
  }
  const array& o = place(s, 0, type, a.shape, a.rank);
  job.op = op;
  job.a = a.data;
  job.a_stride = a_stride;
  job.b_stride = b_stride;
  job.type = float_type(a);
  job.out = o.data;
  job.out_type = float_type(o);
  job.size = static_cast<std::size_t>(a.rank ? a.shape[a.rank - 1] : 1);
  c.each_row(static_cast<std::size_t>(rows_of(a)), job.size,
             [&](std::size_t begin, std::size_t end) { k.elementwise(job, begin, end); });
}

void program::call::compute_rows(const step& s) {
  array a = in(s, 0);
  if (!a.rank) fail("an operation on rows has been given a number");
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
  if (a.type != element::f32) fail("an operation on rows is of f32 alone");
  const auto* in_rows = reinterpret_cast<const float*>(a.data);
  array shape = a;
  if (s.op == opcode::top_k) {
    const std::int64_t n = number(s, 0);
    if (n < 1 || n > size) fail("top_k of " + std::to_string(n) + " among " + std::to_string(size));
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
    if (a.type != shape.type || a.rank != shape.rank) fail("arrays that are joined differ");
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
  if (indices.type != element::i64 || indices.rank != 1) fail("indices are of another kind");
  const auto* at = reinterpret_cast<const std::int64_t*>(indices.data);
  array shape = a;
  shape.shape[d] = indices.shape[0];
  const array b = place(s, 0, a.type, shape.shape, shape.rank);
  for (std::int64_t i = 0; i < indices.shape[0]; ++i) {
    const std::int64_t from = at[i] < 0 ? at[i] + a.shape[d] : at[i];
    if (from < 0 || from >= a.shape[d]) fail("index " + std::to_string(at[i]) + " of " + std::to_string(a.shape[d]));
    copy(c, sliced(a, d, from, from + 1), sliced(b, d, i, i + 1));
  }
}

void program::call::index_copy(const step& s) {
  const array into = in(s, 0), indices = dense(s, in(s, 1)), from = in(s, 2);
  const int d = dimension(into, number(s, 0));
  if (indices.type != element::i64 || indices.count() != from.shape[d] || from.rank != into.rank ||
      from.type != into.type)
    fail("what is copied by index does not fit");
  const auto* at = reinterpret_cast<const std::int64_t*>(indices.data);
  for (std::int64_t i = 0; i < from.shape[d]; ++i) {
    if (at[i] < 0 || at[i] >= into.shape[d])
      fail("index " + std::to_string(at[i]) + " of " + std::to_string(into.shape[d]));
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
      if (a.rank == most_dimensions) fail("too many dimensions");
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
      if (index < -a.shape[d] || index >= a.shape[d]) fail("an index is out of range");
      out(s) = selected(a, d, index < 0 ? index + a.shape[d] : index);
      return;
    }
    case opcode::slice: {
      const array& a = in(s, 0);
      out(s) = sliced(a, dimension(a, number(s, 0)), number(s, 1), number(s, 2));
      return;
    }
    case opcode::expand: {
      const array& a = in(s, 0);
      array b = a;
      b.rank = static_cast<int>(s.n.size());
      for (int i = b.rank - 1, j = a.rank - 1; i >= 0; --i, --j) {
        const std::int64_t size = number(s, static_cast<std::size_t>(i));
        b.shape[i] = size < 0 ? a.shape[j] : size;
        b.strides[i] = j < 0 || (a.shape[j] == 1 && b.shape[i] != 1) ? 0 : a.strides[j];
        if (j >= 0 && a.shape[j] != 1 && a.shape[j] != b.shape[i]) fail("a dimension cannot be expanded");
      }
      out(s) = b;
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
    case opcode::linear: return compute_linear(s);
    case opcode::moe: return compute_moe(s);
    case opcode::norm: return compute_norm(s, false);
    case opcode::add_norm: return compute_norm(s, true);
    case opcode::rotary: return compute_rotary(s);
    case opcode::attention: return compute_attention(s);
    case opcode::cached_attention: return compute_cached_attention(s);
    case opcode::elementwise: return compute_elementwise(s);
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
    if (i < 0 || i >= arrays_) fail("array " + std::to_string(i) + " of " + std::to_string(arrays_));
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
    if (s.op <= opcode::contiguous || s.op == opcode::index_copy)  // may be a view of its first operand
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

void program::set_linear(int packed, const packed_weight* weight, std::size_t features, std::size_t k, const isa* i) {
  packed_.at(static_cast<std::size_t>(packed)) = {weight, features, k, nullptr, i};
}

void program::set_experts(int packed, const experts* e, const isa* i) {
  packed_.at(static_cast<std::size_t>(packed)) = {nullptr, 0, 0, e, i};
}

std::vector<result> program::run(context& c, const kernel_table& kernels, const std::vector<array>& arguments,
                                 const std::vector<std::int64_t>& whole, const std::vector<double>& real,
                                 const allocator& allocate) {
  if (static_cast<int>(arguments.size()) != arguments_) fail("another number of arguments");
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
