// What the files of the Python module share. Tensors cross as addresses, which Python has validated.
#pragma once
#include <kt/context.h>
#include <kt/isa.h>
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

template <class T>
T* address(std::uintptr_t a) {
  return reinterpret_cast<T*>(a);
}

inline const kt::isa& isa_named(const std::string& name) {
  if (const kt::isa* i = kt::find_isa(name)) return *i;
  throw std::invalid_argument("this build has no kernels for ISA '" + name + "'");
}

// The weight of a linear layer, or of one for each head.
struct packed_linear {
  std::size_t features, k;  // of a head
  int heads;
  kt::packed_weight weight;
  packed_linear(const kt::weight_format& format, std::size_t n, std::size_t in, int count)
      : features(n),
        k(in),
        heads(count),
        weight(format, count, (n + kt::panel_columns - 1) / kt::panel_columns, 0, in, kt::column_map::plain(0, n), -1) {
  }
  void check(int head) const {
    if (head < 0 || head >= heads)
      throw std::out_of_range("head " + std::to_string(head) + " of " + std::to_string(heads));
  }
};

void bind_program(nanobind::module_& m);
