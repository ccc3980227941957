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

struct packed_linear {
  std::size_t features, k;
  kt::packed_weight weight;
  packed_linear(const kt::weight_format& format, std::size_t n, std::size_t in)
      : features(n),
        k(in),
        weight(format, 1, (n + kt::panel_columns - 1) / kt::panel_columns, 0, in, kt::column_map::plain(0, n), -1) {}
};

void bind_program(nanobind::module_& m);
