#include "arrays.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>

namespace kt {

void fail_program(const std::string& what) { throw std::invalid_argument("program: " + what); }

dtype float_type(const array& a) {
  if (a.type > element::bf16) fail_program("an operation on floats has been given integers");
  return static_cast<dtype>(a.type);
}

int dimension(const array& a, std::int64_t d, int extra) {
  const std::int64_t rank = a.rank + extra, i = d < 0 ? d + rank : d;
  if (i < 0 || i >= rank) fail_program("dimension " + std::to_string(d) + " of " + std::to_string(rank));
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

array expanded(const array& a, const std::int64_t* shape, int rank) {
  if (rank < a.rank) fail_program("a shape has fewer dimensions");
  array b = a;
  b.rank = rank;
  for (int i = 0; i < rank; ++i) {
    const int j = i - rank + a.rank;
    const bool same = j >= 0 && a.shape[j] == shape[i];
    if (shape[i] < 0 || (j >= 0 && !same && a.shape[j] != 1)) fail_program("a dimension cannot be expanded");
    b.shape[i] = shape[i];
    b.strides[i] = same ? a.strides[j] : 0;
  }
  return b;
}

int broadcast(const array& a, const array& b, std::int64_t* shape) {
  const int rank = std::max(a.rank, b.rank);
  for (int i = 0; i < rank; ++i) {
    const int j = i - rank + a.rank, k = i - rank + b.rank;
    shape[i] = j < 0 || (k >= 0 && a.shape[j] == 1) ? b.shape[k] : a.shape[j];
  }
  return rank;
}

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

std::int64_t array::count() const { return std::accumulate(shape, shape + rank, std::int64_t{1}, std::multiplies<>()); }

bool array::contiguous() const {
  std::int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

}  // namespace kt
