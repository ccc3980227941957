// The Python module ktcompile._native. Tensors cross as addresses, which Python has validated.
#include <kt/experts.h>
#include <kt/isa.h>
#include <kt/moe.h>
#include <kt/nan_memory.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
T* address(std::uintptr_t a) {
  return reinterpret_cast<T*>(a);
}

const kt::isa& isa_named(const std::string& name) {
  if (const kt::isa* i = kt::find_isa(name)) return *i;
  throw std::invalid_argument("this build has no kernels for ISA '" + name + "'");
}

std::vector<std::string> features_to_names(kt::feature_set features) {
  std::vector<std::string> names;
  for (const kt::feature_name& f : kt::feature_names())
    if (features & f.bit) names.emplace_back(f.name);
  return names;
}

kt::feature_set names_to_features(const std::vector<std::string>& names) {
  kt::feature_set features = kt::feature::none;
  for (const std::string& name : names) {
    kt::feature_set bit = kt::feature::none;
    for (const kt::feature_name& f : kt::feature_names())
      if (name == f.name) bit = f.bit;
    if (!bit) throw std::invalid_argument("no CPU feature is called '" + name + "'");
    features |= bit;
  }
  return features;
}

// The table that runs `format` on rows of type `rows`: VDPBF16PS needs both in bf16.
const kt::kernel_table& kernels_for(const std::string& isa, kt::dtype format, kt::dtype rows) {
  const bool both = format == kt::dtype::bf16 && rows == kt::dtype::bf16;
  const kt::kernel_table& k = *isa_named(isa).kernels;
  return k.rows_in_bf16 && !both ? *isa_named("avx512").kernels : k;
}

using strides = std::tuple<std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t>;

kt::weight_view view(std::uintptr_t data, kt::dtype type, strides s) {
  return {address<void>(data), type, std::get<0>(s), std::get<1>(s), std::get<2>(s)};
}

kt::bias_view bias(std::uintptr_t data, kt::dtype type, std::tuple<std::ptrdiff_t, std::ptrdiff_t> s) {
  return {address<void>(data), type, std::get<0>(s), std::get<1>(s)};
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of ktcompile.";
  nb::set_leak_warnings(false);  // packed weights may live as long as the process

  nb::enum_<kt::dtype>(m, "DType")
      .value("f32", kt::dtype::f32)
      .value("f16", kt::dtype::f16)
      .value("bf16", kt::dtype::bf16);
  nb::enum_<kt::activation>(m, "Activation")
      .value("silu", kt::activation::silu)
      .value("gelu_tanh", kt::activation::gelu_tanh)
      .value("gelu_erf", kt::activation::gelu_erf)
      .value("relu", kt::activation::relu)
      .value("relu2", kt::activation::relu2)
      .value("swigluoai", kt::activation::swigluoai);

  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const kt::isa& i : kt::all_isas()) names.emplace_back(i.name);
        return names;
      },
      "Names of the instruction sets of this build, best first.");
  m.def(
      "isas_for",
      [](const std::vector<std::string>& features) {
        std::vector<std::string> names;
        for (const kt::isa& i : kt::all_isas())
          if (kt::runs_on(i, names_to_features(features))) names.emplace_back(i.name);
        return names;
      },
      "features"_a, "Names of the instruction sets that run on a CPU with these features, best first.");
  m.def(
      "select_isa",
      [](const std::vector<std::string>& features) {
        return std::string(kt::select_isa(names_to_features(features)).name);
      },
      "features"_a, "Name of the instruction set to use; among those that give the same bits the faster, measured.");
  m.def("cpu_features", [] { return features_to_names(kt::cpu_features()); }, "Features that this CPU reports.");
  m.def(
      "executes", [](const std::vector<std::string>& features) { return kt::executes(names_to_features(features)); },
      "features"_a, "Whether this CPU executes features that it may not report; tried in a child process.");

  m.def(
      "map_nan",
      [](std::size_t bytes, kt::dtype type) { return reinterpret_cast<std::uintptr_t>(kt::map_nan(bytes, type)); },
      "bytes"_a, "type"_a, "Address of memory that reads as NaN and takes no room until it is written.");
  m.def(
      "unmap_nan", [](std::uintptr_t p, std::size_t bytes) { kt::unmap_nan(address<void>(p), bytes); }, "address"_a,
      "bytes"_a);

  nb::class_<kt::experts>(m, "Experts")
      .def(
          "__init__",
          [](kt::experts* self, int num_experts, std::size_t hidden_size, std::size_t intermediate_size,
             kt::dtype format, kt::activation kind, bool gated, bool interleaved, float alpha, float limit) {
            kt::experts_shape shape;
            shape.num_experts = num_experts;
            shape.hidden_size = hidden_size;
            shape.intermediate_size = intermediate_size;
            shape.act = {kind, gated, alpha, limit};
            shape.interleaved = interleaved;
            new (self) kt::experts(shape, format);
          },
          "num_experts"_a, "hidden_size"_a, "intermediate_size"_a, "format"_a, "activation"_a, "gated"_a,
          "interleaved"_a, "alpha"_a, "limit"_a)
      .def(
          "pack",
          [](kt::experts& self, int expert, std::uintptr_t gate_up, strides gate_up_strides, std::uintptr_t down,
             strides down_strides, kt::dtype type) {
            self.pack(expert, view(gate_up, type, gate_up_strides), view(down, type, down_strides));
          },
          "expert"_a, "gate_up"_a, "gate_up_strides"_a, "down"_a, "down_strides"_a, "type"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "pack_bias",
          [](kt::experts& self, std::uintptr_t gate_up, std::tuple<std::ptrdiff_t, std::ptrdiff_t> gate_up_strides,
             std::uintptr_t down, std::tuple<std::ptrdiff_t, std::ptrdiff_t> down_strides,
             kt::dtype type) { self.pack_bias(bias(gate_up, type, gate_up_strides), bias(down, type, down_strides)); },
          "gate_up"_a, "gate_up_strides"_a, "down"_a, "down_strides"_a, "type"_a)
      .def(
          "unpack",
          [](const kt::experts& self, int expert, std::uintptr_t gate_up, strides gate_up_strides, std::uintptr_t down,
             strides down_strides, kt::dtype type) {
            self.unpack(expert, view(gate_up, type, gate_up_strides), view(down, type, down_strides));
          },
          "expert"_a, "gate_up"_a, "gate_up_strides"_a, "down"_a, "down_strides"_a, "type"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("nbytes", &kt::experts::bytes);

  nb::class_<kt::context>(m, "Context")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &kt::context::threads)
      .def("moe",
           [](kt::context& self, const kt::experts& experts, const std::string& isa, std::size_t tokens, int top_k,
              std::uintptr_t hidden, kt::dtype hidden_type, std::size_t hidden_stride, std::uintptr_t ids,
              bool ids_are_64_bit, std::uintptr_t weights, kt::dtype weights_type, std::uintptr_t out,
              std::size_t out_stride) {
             const kt::kernel_table& kernels = kernels_for(isa, experts.down.format, hidden_type);
             std::string wrong;
             {
               nb::gil_scoped_release nogil;
               wrong = self.moe(experts, kernels,
                                {tokens, top_k, address<void>(hidden), hidden_type, hidden_stride, address<void>(ids),
                                 ids_are_64_bit ? kt::id_type::i64 : kt::id_type::i32, address<void>(weights),
                                 weights_type, address<void>(out), out_stride});
             }
             if (!wrong.empty()) throw std::invalid_argument(wrong);
           })
      .def(
          "read_bandwidth",
          [](kt::context& self, const std::string& isa, std::size_t bytes, int repeats) {
            return self.read_bandwidth(*isa_named(isa).kernels, bytes, repeats);
          },
          "isa"_a, "bytes"_a, "repeats"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "arithmetic",
          [](kt::context& self, const std::string& isa, int repeats) {
            return self.arithmetic(*isa_named(isa).kernels, repeats);
          },
          "isa"_a, "repeats"_a, nb::call_guard<nb::gil_scoped_release>());
}
