// Programs: what a graph has between operations of torch, run by one call.
#include <kt/program.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// (where: a result's number or -1 - that of an argument, offset, shape, strides)
using view_of = std::tuple<int, std::int64_t, std::vector<std::int64_t>, std::vector<std::int64_t>>;

using allocator = nb::typed<nb::callable, std::uintptr_t(kt::element, std::vector<std::int64_t>)>;

struct bound_program {
  std::vector<kt::element> types;  // of the tensors that a call is given first
  std::size_t whole, real;         // numbers that follow them
  kt::program program;
  bound_program(std::vector<kt::element> t, std::size_t n, std::size_t x)
      : types(std::move(t)), whole(n), real(x), program(static_cast<int>(types.size())) {}
};

void read_sizes(const nb::object& sizes, std::int64_t* to) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes.ptr()); ++i) to[i] = integer(PyTuple_GET_ITEM(sizes.ptr(), i));
}

kt::array array_of(nb::handle tensor, kt::element type) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const shape_of = PyUnicode_InternFromString("shape");
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  const nb::object shape = attribute_of(tensor, shape_of), strides = result_of(tensor, stride);
  if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr())) throw std::invalid_argument("program: no tensor");
  const Py_ssize_t rank = PyTuple_GET_SIZE(shape.ptr());
  if (rank > kt::most_dimensions || PyTuple_GET_SIZE(strides.ptr()) != rank)
    throw std::invalid_argument("program: too many dimensions");
  kt::array a;
  a.data = address<char>(static_cast<std::uintptr_t>(integer(result_of(tensor, data_ptr))));
  a.type = type;
  a.rank = static_cast<int>(rank);
  read_sizes(shape, a.shape);
  read_sizes(strides, a.strides);
  return a;
}

std::vector<view_of> run(bound_program& self, kt::context& context, const std::string& isa,
                         const arguments_of_call& arguments, const allocator& allocate) {
  const std::size_t tensors = self.types.size(), numbers = tensors + self.whole;
  if (arguments.size() < numbers + self.real) throw std::invalid_argument("program: too few arguments");
  std::vector<kt::array> arrays;
  arrays.reserve(tensors);
  for (std::size_t i = 0; i < tensors; ++i) arrays.push_back(array_of(arguments[i], self.types[i]));
  std::vector<std::int64_t> whole;
  for (std::size_t i = tensors; i < numbers; ++i) whole.push_back(integer(arguments[i]));
  std::vector<double> real;
  for (std::size_t i = 0; i < self.real; ++i) real.push_back(nb::cast<double>(arguments[numbers + i]));
  const auto memory = [&](kt::element type, const std::int64_t* shape, int rank) {
    const nb::gil_scoped_acquire gil;
    return address<void>(nb::cast<std::uintptr_t>(allocate(type, std::vector<std::int64_t>(shape, shape + rank))));
  };
  std::vector<kt::result> results;
  {
    const nb::gil_scoped_release nogil;
    results = self.program.run(context, *isa_named(isa).kernels, arrays, whole, real, memory);
  }
  std::vector<view_of> found;
  for (kt::result& r : results) found.emplace_back(r.source, r.offset, std::move(r.shape), std::move(r.strides));
  return found;
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::enum_<kt::element>(m, "Element")
      .value("f32", kt::element::f32)
      .value("f16", kt::element::f16)
      .value("bf16", kt::element::bf16)
      .value("i64", kt::element::i64)
      .value("boolean", kt::element::boolean)
      .value("i32", kt::element::i32)
      .value("i8", kt::element::i8);
  nb::enum_<kt::element_op>(m, "ElementOp")
      .value("copy", kt::element_op::copy)
      .value("add", kt::element_op::add)
      .value("sub", kt::element_op::sub)
      .value("mul", kt::element_op::mul)
      .value("div", kt::element_op::div)
      .value("silu", kt::element_op::silu)
      .value("sigmoid", kt::element_op::sigmoid)
      .value("gelu_tanh", kt::element_op::gelu_tanh)
      .value("gelu_erf", kt::element_op::gelu_erf)
      .value("cos", kt::element_op::cos)
      .value("sin", kt::element_op::sin);
  nb::enum_<kt::integer_op>(m, "IntegerOp")
      .value("add", kt::integer_op::add)
      .value("sub", kt::integer_op::sub)
      .value("mul", kt::integer_op::mul)
      .value("le", kt::integer_op::le)
      .value("lt", kt::integer_op::lt)
      .value("ge", kt::integer_op::ge)
      .value("gt", kt::integer_op::gt)
      .value("conjunction", kt::integer_op::conjunction);
  nb::enum_<kt::opcode>(m, "Opcode")
      .value("reshape", kt::opcode::reshape)
      .value("transpose", kt::opcode::transpose)
      .value("unsqueeze", kt::opcode::unsqueeze)
      .value("squeeze", kt::opcode::squeeze)
      .value("select", kt::opcode::select)
      .value("slice", kt::opcode::slice)
      .value("expand", kt::opcode::expand)
      .value("contiguous", kt::opcode::contiguous)
      .value("linear", kt::opcode::linear)
      .value("head_linear", kt::opcode::head_linear)
      .value("moe", kt::opcode::moe)
      .value("norm", kt::opcode::norm)
      .value("add_norm", kt::opcode::add_norm)
      .value("rotary", kt::opcode::rotary)
      .value("attention", kt::opcode::attention)
      .value("cached_attention", kt::opcode::cached_attention)
      .value("elementwise", kt::opcode::elementwise)
      .value("integers", kt::opcode::integers)
      .value("add_number", kt::opcode::add_number)
      .value("arange", kt::opcode::arange)
      .value("embedding", kt::opcode::embedding)
      .value("softmax", kt::opcode::softmax)
      .value("top_k", kt::opcode::top_k)
      .value("row_sum", kt::opcode::row_sum)
      .value("concat", kt::opcode::concat)
      .value("index_select", kt::opcode::index_select)
      .value("index_copy", kt::opcode::index_copy);
  nb::class_<bound_program>(m, "Program", "Operations that run without Python, native/include/kt/program.h.")
      .def(nb::init<std::vector<kt::element>, std::size_t, std::size_t>(), "tensors"_a, "whole"_a, "real"_a)
      .def(
          "add",
          [](bound_program& self, kt::opcode op, std::vector<int> in, int outs,
             const std::vector<std::tuple<std::int64_t, int>>& n, const std::vector<std::tuple<double, int>>& x,
             int packed) {
            std::vector<kt::whole_number> whole;
            for (const auto& [value, slot] : n) whole.push_back({value, slot});
            std::vector<kt::real_number> real;
            for (const auto& [value, slot] : x) real.push_back({value, slot});
            return self.program.add(op, std::move(in), outs, std::move(whole), std::move(real), packed);
          },
          "op"_a, "arrays"_a, "outs"_a, "whole"_a, "real"_a, "packed"_a,
          "Return the first of the numbers of the arrays that it gives. Numbers are (value, -1) or (0, which "
          "argument).")
      .def(
          "finish", [](bound_program& self, std::vector<int> results) { self.program.finish(std::move(results)); },
          "results"_a)
      .def(
          "set_linear",
          [](bound_program& self, int packed, const packed_linear& w, const std::string& isa) {
            self.program.set_linear(packed, &w.weight, w.features, w.k, w.heads, &isa_named(isa));
          },
          "packed"_a, "weight"_a, "isa"_a, "The weight must outlive calls that follow.")
      .def(
          "set_experts",
          [](bound_program& self, int packed, const kt::experts& e, const std::string& isa) {
            self.program.set_experts(packed, &e, &isa_named(isa));
          },
          "packed"_a, "experts"_a, "isa"_a, "The experts must outlive calls that follow.")
      .def("run", run, "context"_a, "isa"_a, "arguments"_a, "allocate"_a,
           "Arguments: tensors, whole and real numbers, and what the steps do not read. Return (where, offset, shape, "
           "strides) of each result; where: which of what `allocate(type, shape)` gave, "
           "or -1 - the number of an argument.");
}
