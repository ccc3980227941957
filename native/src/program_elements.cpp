// Steps that compute one element from one or two, and those that make integers or look rows up.
#include <cstring>
#include <functional>
#include <string>

#include "program_call.h"

namespace kt {
namespace {

// `a` whose rows lie `stride` elements apart, or a copy of which they do.
array in_rows(const array& a, std::int64_t& stride, const std::function<array(const array&)>& dense) {
  if (as_rows(a, stride)) return a;
  const array b = dense(a);
  as_rows(b, stride);
  return b;
}

// out = f(a, b), each row of the last dimension by itself.
template <class In, class Out, class F>
void each_pair(context& c, const array& a, const array& b, const array& out, F f) {
  const int last = out.rank - 1;
  const std::int64_t size = last < 0 ? 1 : out.shape[last];
  const std::int64_t a_step = last < 0 ? 0 : a.strides[last], b_step = last < 0 ? 0 : b.strides[last];
  const auto rows = static_cast<std::size_t>(size ? out.count() / size : 0);
  c.each_row(rows, static_cast<std::size_t>(size), [&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      std::int64_t left = static_cast<std::int64_t>(row), a_at = 0, b_at = 0;
      for (int i = last - 1; i >= 0; --i) {
        a_at += left % out.shape[i] * a.strides[i];
        b_at += left % out.shape[i] * b.strides[i];
        left /= out.shape[i];
      }
      const In* x = reinterpret_cast<const In*>(a.data) + a_at;
      const In* y = reinterpret_cast<const In*>(b.data) + b_at;
      Out* o = reinterpret_cast<Out*>(out.data) + static_cast<std::int64_t>(row) * size;
      if (a_step == 1 && b_step == 0 && size)
        for (std::int64_t i = 0, second = *y; i < size; ++i) o[i] = f(x[i], static_cast<In>(second));
      else
        for (std::int64_t i = 0; i < size; ++i) o[i] = f(x[i * a_step], y[i * b_step]);
    }
  });
}

}  // namespace

void program::call::compute_elementwise(const step& s) {
  const auto type = static_cast<element>(number(s, 1));
  const auto dense_of = [&](const array& x) { return dense(s, x); };
  array a = in(s, 0);
  if (a.type == element::i64) {
    if (type != element::f32) fail_program("integers become f32 alone");
    const array& o = place(s, 0, type, a.shape, a.rank);
    return each_pair<std::int64_t, float>(c, a, a, o, [](std::int64_t x, std::int64_t) { return float(x); });
  }
  elementwise_job job{};
  job.op = static_cast<element_op>(number(s, 0));
  job.type = float_type(a);
  if (s.in.size() > 1) {
    array b = in(s, 1);
    if (b.type != a.type) fail_program("operands differ");
    std::int64_t shape[most_dimensions], stride;
    const int rank = broadcast(a, b, shape);
    if (!rank) fail_program("an operation on rows has been given numbers");
    a = expanded(a, shape, rank);
    job.b_single = shape[rank - 1] != 1 && (!b.rank || b.shape[b.rank - 1] == 1);
    if (job.b_single) shape[rank - 1] = 1;
    b = in_rows(expanded(b, shape, rank), stride, dense_of);
    job.b = b.data;
    job.b_stride = stride;
  } else if (!s.x.empty()) {
    job.number = static_cast<float>(real_number_of(s, 0));
  }
  std::int64_t stride;
  a = in_rows(a, stride, dense_of);
  job.a = a.data;
  job.a_stride = stride;
  const array& o = place(s, 0, type, a.shape, a.rank);
  job.out = o.data;
  job.out_type = float_type(o);
  job.size = static_cast<std::size_t>(a.rank ? a.shape[a.rank - 1] : 1);
  c.each_row(static_cast<std::size_t>(rows_of(a)), job.size,
             [&](std::size_t begin, std::size_t end) { k.elementwise(job, begin, end); });
}

void program::call::compute_integers(const step& s) {
  const auto op = static_cast<integer_op>(number(s, 0));
  array a = in(s, 0), b;
  std::int64_t one = 0;
  if (s.in.size() > 1) {
    b = in(s, 1);
  } else {
    one = number(s, 1);
    b.type = element::i64;
    b.data = reinterpret_cast<char*>(&one);
  }
  const element type = op == integer_op::conjunction ? element::boolean : element::i64;
  if (a.type != type || b.type != type) fail_program("operands are no integers");
  std::int64_t shape[most_dimensions];
  const int rank = broadcast(a, b, shape);
  a = expanded(a, shape, rank);
  b = expanded(b, shape, rank);
  const array& o = place(s, 0, op >= integer_op::le ? element::boolean : type, shape, rank);
  const auto of = [&]<class Out>(auto f) { each_pair<std::int64_t, Out>(c, a, b, o, f); };
  switch (op) {
    case integer_op::add: return of.operator()<std::int64_t>(std::plus<>());
    case integer_op::sub: return of.operator()<std::int64_t>(std::minus<>());
    case integer_op::mul: return of.operator()<std::int64_t>(std::multiplies<>());
    case integer_op::le: return of.operator()<bool>(std::less_equal<>());
    case integer_op::lt: return of.operator()<bool>(std::less<>());
    case integer_op::ge: return of.operator()<bool>(std::greater_equal<>());
    case integer_op::gt: return of.operator()<bool>(std::greater<>());
    case integer_op::conjunction: return each_pair<bool, bool>(c, a, b, o, std::logical_and<>());
  }
}

void program::call::add_number(const step& s) {
  const array& into = in(s, 0);
  if (into.type != element::i64 || !into.contiguous()) fail_program("a number is added to what is none");
  auto* values = reinterpret_cast<std::int64_t*>(into.data);
  for (std::int64_t i = 0; i < into.count(); ++i) values[i] += number(s, 0);
  out(s) = into;
}

void program::call::arange(const step& s) {
  const std::int64_t begin = number(s, 0), end = number(s, 1);
  if (end < begin) fail_program("a range ends before it begins");
  const std::int64_t size = end - begin;
  auto* values = reinterpret_cast<std::int64_t*>(place(s, 0, element::i64, &size, 1).data);
  for (std::int64_t i = 0; i < size; ++i) values[i] = begin + i;
}

void program::call::embedding(const step& s) {
  const array indices = dense(s, in(s, 1));
  array table = in(s, 0);
  std::int64_t stride;
  if (indices.type != element::i64 || table.rank != 2 || indices.rank == most_dimensions)
    fail_program("rows of a table are looked up otherwise");
  table = in_rows(table, stride, [&](const array& x) { return dense(s, x); });
  std::int64_t shape[most_dimensions];
  std::copy(indices.shape, indices.shape + indices.rank, shape);
  shape[indices.rank] = table.shape[1];
  const array& o = place(s, 0, table.type, shape, indices.rank + 1);
  const auto* at = reinterpret_cast<const std::int64_t*>(indices.data);
  const std::int64_t count = indices.count(), bytes = static_cast<std::int64_t>(size_of(table.type));
  for (std::int64_t i = 0; i < count; ++i)
    if (at[i] < 0 || at[i] >= table.shape[0])
      throw std::out_of_range("index " + std::to_string(at[i]) + " of a table of " + std::to_string(table.shape[0]));
  const auto size = static_cast<std::size_t>(table.shape[1] * bytes);
  c.each_row(static_cast<std::size_t>(count), static_cast<std::size_t>(table.shape[1]),
             [&](std::size_t begin, std::size_t end) {
               for (std::size_t i = begin; i < end; ++i)
                 std::memcpy(o.data + i * size, table.data + at[i] * stride * bytes, size);
             });
}

}  // namespace kt
