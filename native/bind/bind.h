// What the files of the Python module share. Tensors cross as addresses, which Python has validated.
#pragma once
#include <kt/context.h>
#include <kt/isa.h>
#include <nanobind/nanobind.h>

#include <cstdint>
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

using arguments_of_call = nanobind::typed<nanobind::tuple, nanobind::any, nanobind::ellipsis>;

// What Python says of a tensor, by names that are made once.
inline nanobind::object result_of(nanobind::handle h, PyObject* method) {
  PyObject* found = PyObject_CallMethodNoArgs(h.ptr(), method);
  if (!found) nanobind::raise_python_error();
  return nanobind::steal(found);
}
inline nanobind::object attribute_of(nanobind::handle h, PyObject* name) {
  PyObject* found = PyObject_GetAttr(h.ptr(), name);
  if (!found) nanobind::raise_python_error();
  return nanobind::steal(found);
}
inline std::int64_t integer(nanobind::handle h) {
  const std::int64_t value = PyLong_AsLongLong(h.ptr());
  if (value == -1 && PyErr_Occurred()) nanobind::raise_python_error();
  return value;
}

void bind_program(nanobind::module_& m);
void bind_watch(nanobind::module_& m);
