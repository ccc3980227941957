// The Python module ktcompile._native.
#include <kt/context.h>
#include <kt/experts.h>
#include <kt/isa.h>
#include <kt/nan_memory.h>
#include <kt/topology.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

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

using strides = std::tuple<std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t>;

kt::weight_view view(std::uintptr_t data, kt::dtype type, strides s) {
  return {address<void>(data), type, std::get<0>(s), std::get<1>(s), std::get<2>(s)};
}

using strides2 = std::tuple<std::ptrdiff_t, std::ptrdiff_t>;

kt::bias_view bias(std::uintptr_t data, kt::dtype type, strides2 s) {
  return {address<void>(data), type, std::get<0>(s), std::get<1>(s)};
}

// (codes, their strides in bytes, scales, zero points or 0, the strides of both)
using quantized = std::tuple<std::uintptr_t, strides, std::uintptr_t, std::uintptr_t, strides>;

kt::quantized_view view(const quantized& q) {
  const auto& [codes, code_strides, scales, zeros, scale_strides] = q;
  return {address<std::uint8_t>(codes), std::get<0>(code_strides),  std::get<1>(code_strides),
          std::get<2>(code_strides),    address<float>(scales),     address<std::uint8_t>(zeros),
          std::get<0>(scale_strides),   std::get<1>(scale_strides), std::get<2>(scale_strides)};
}

// Threads spread over the NUMA nodes of `sys_root`, and the nodes' ids.
std::vector<kt::thread_place> places(int threads, const kt::topology& topology) {
  const kt::placement placement = kt::assign(topology, threads);
  std::vector<kt::thread_place> result;
  for (int t = 0; t < threads; ++t) result.push_back({placement.node[t], placement.cpu[t]});
  return result;
}

// (address, stride of rows, stride of heads)
using heads_place = std::tuple<std::uintptr_t, std::size_t, std::size_t>;
// (address, stride of groups, stride of rows)
using rows_place = std::tuple<std::uintptr_t, std::ptrdiff_t, std::ptrdiff_t>;

// (address or 0, type, offset, epsilon, round_first)
using norm_weight = std::tuple<std::uintptr_t, kt::dtype, float, float, bool>;

kt::norm_weight view(const norm_weight& w) {
  const auto [values, type, offset, epsilon, round_first] = w;
  return {address<void>(values), type, offset, epsilon, round_first};
}

using attention_place = std::tuple<std::uintptr_t, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t>;

kt::attention_strides strides_of(const attention_place& p) { return {std::get<1>(p), std::get<2>(p), std::get<3>(p)}; }
kt::attention_place view(const attention_place& p) { return {address<void>(std::get<0>(p)), strides_of(p)}; }

// (address or 0, stride of sequences in elements, positions of a block)
using block_table = std::tuple<std::uintptr_t, std::size_t, std::int64_t>;
// Queries and positions of each sequence, position of the first query or -1; addresses or 0 of query starts and
// lengths.
using attention_counts = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>;
// (address, its strides, kind); (causal, window or 0, scale, softcap or 0, address of sinks or 0)
using attention_mask = std::tuple<attention_place, kt::mask_type>;
using attention_rule = std::tuple<bool, std::int64_t, float, float, std::uintptr_t>;
// Scales of keys and of values: (place, elements that share one).
using attention_scales = std::tuple<attention_place, std::size_t>;

kt::attention_scales view(const attention_scales& s) { return {view(std::get<0>(s)), std::get<1>(s)}; }

using place = std::tuple<std::uintptr_t, std::size_t>;  // (address, bytes)
place of_region(const kt::region& r) { return {reinterpret_cast<std::uintptr_t>(r.data), r.bytes}; }

void check_expert(const kt::experts& e, int expert) {
  if (expert < 0 || expert >= e.shape.num_experts)
    throw std::out_of_range("expert " + std::to_string(expert) + " of " + std::to_string(e.shape.num_experts));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of ktcompile.";
  nb::set_leak_warnings(false);  // packed weights may live as long as the process

  nb::enum_<kt::dtype>(m, "DType")
      .value("f32", kt::dtype::f32)
      .value("f16", kt::dtype::f16)
      .value("bf16", kt::dtype::bf16);
  nb::enum_<kt::format>(m, "Layout")
      .value("f32", kt::format::f32)
      .value("f16", kt::format::f16)
      .value("bf16", kt::format::bf16)
      .value("int8", kt::format::int8)
      .value("int8_dyn", kt::format::int8_dyn)
      .value("int4", kt::format::int4)
      .value("fp8", kt::format::fp8)
      .value("mxfp4", kt::format::mxfp4)
      .value("int4_dyn", kt::format::int4_dyn);
  nb::enum_<kt::scale_type>(m, "ScaleType")
      .value("none", kt::scale_type::none)
      .value("f32", kt::scale_type::f32)
      .value("f16", kt::scale_type::f16)
      .value("bf16", kt::scale_type::bf16)
      .value("e8m0", kt::scale_type::e8m0);
  nb::class_<kt::weight_format>(m, "Format")
      .def(
          "__init__",
          [](kt::weight_format* self, kt::format kind, int group, kt::scale_type scale, bool zero_points) {
            const kt::weight_format format{kind, group, scale, zero_points};
            kt::check_format(format);
            new (self) kt::weight_format(format);
          },
          "layout"_a, "group"_a, "scale"_a, "zero_points"_a)
      .def_ro("scale", &kt::weight_format::scale);
  nb::enum_<kt::mask_type>(m, "MaskType")
      .value("none", kt::mask_type::none)
      .value("boolean", kt::mask_type::boolean)
      .value("f32", kt::mask_type::f32)
      .value("f16", kt::mask_type::f16)
      .value("bf16", kt::mask_type::bf16);
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
  m.def(
      "sums_on_tiles", [](const std::string& name) { return isa_named(name).kernels->tiles; }, "isa"_a,
      "Whether floats are summed in the order of AMX, which rounds otherwise than all other instruction sets.");
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

  m.attr("LAYOUT_VERSION") = kt::layout_version;

  m.def(
      "numa_nodes",
      [](const std::string& sys_root) {
        std::vector<int> nodes;
        for (const kt::numa_node& n : kt::read_topology(sys_root).nodes) nodes.push_back(n.id);
        if (nodes.size() == 1) nodes[0] = -1;  // what `numactl` says of a process's memory stays true
        return nodes;
      },
      "sys_root"_a = "/sys", "Ids of the NUMA nodes with memory and CPUs of this process; -1 where there is but one.");

  nb::class_<kt::experts>(m, "Experts")
      .def(
          "__init__",
          [](kt::experts* self, int num_experts, std::size_t hidden_size, std::size_t intermediate_size,
             const kt::weight_format& format, kt::activation kind, bool gated, bool interleaved, float alpha,
             float limit, const std::vector<int>& nodes) {
            kt::experts_shape shape;
            shape.num_experts = num_experts;
            shape.hidden_size = hidden_size;
            shape.intermediate_size = intermediate_size;
            shape.act = {kind, gated, alpha, limit};
            shape.interleaved = interleaved;
            new (self) kt::experts(shape, format, nodes);
          },
          "num_experts"_a, "hidden_size"_a, "intermediate_size"_a, "format"_a, "activation"_a, "gated"_a,
          "interleaved"_a, "alpha"_a, "limit"_a, "nodes"_a)
      .def(
          "pack",
          [](kt::experts& self, int expert, std::uintptr_t gate_up, strides gate_up_strides, std::uintptr_t down,
             strides down_strides, kt::dtype type) {
            self.pack(expert, view(gate_up, type, gate_up_strides), view(down, type, down_strides));
          },
          "expert"_a, "gate_up"_a, "gate_up_strides"_a, "down"_a, "down_strides"_a, "type"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "pack_quantized",
          [](kt::experts& self, int expert, const quantized& gate_up, const quantized& down) {
            const nb::gil_scoped_release nogil;
            self.pack(expert, view(gate_up), view(down));
          },
          "expert"_a, "gate_up"_a, "down"_a,
          "Each is (codes, strides of (expert, n, k), scales, zero points or 0, strides of (expert, n, group)).")
      .def(
          "pack_bias",
          [](kt::experts& self, std::uintptr_t gate_up, strides2 gate_up_strides, std::uintptr_t down,
             strides2 down_strides,
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
      .def_prop_ro("tokens",
                   [](const kt::experts& self) {
                     std::vector<std::uint64_t> counts;
                     for (std::uint64_t& count : self.tokens)
                       counts.push_back(__atomic_load_n(&count, __ATOMIC_RELAXED));
                     return counts;
                   })
      .def_prop_ro("slices",
                   [](const kt::experts& self) {
                     std::vector<std::size_t> sizes;
                     for (const kt::expert_slice& s : self.slices) sizes.push_back(s.down.k());
                     return sizes;
                   })
      .def(
          "copy",
          [](kt::experts& self, int expert, const kt::experts& source, int source_expert) {
            check_expert(self, expert);
            check_expert(source, source_expert);
            const nb::gil_scoped_release nogil;
            self.copy(expert, source, source_expert);
          },
          "expert"_a, "source"_a, "source_expert"_a, "Takes over an expert from a layer of the same shape and format.")
      .def_prop_ro("format", [](const kt::experts& self) { return self.format; })
      .def_prop_ro("parts", &kt::experts::parts,
                   "Bytes of an expert as `read` writes them: of each slice gate_up, its bias, down, its bias.")
      .def(
          "read",
          [](const kt::experts& self, int expert, std::uintptr_t to) {
            check_expert(self, expert);
            const nb::gil_scoped_release nogil;
            self.read(expert, address<char>(to));
          },
          "expert"_a, "to"_a, "Writes an expert's bytes to an address, where there is room for all `parts`.")
      .def(
          "write",
          [](kt::experts& self, int expert, std::uintptr_t source) {
            check_expert(self, expert);
            const nb::gil_scoped_release nogil;
            self.write(expert, address<char>(source));
          },
          "expert"_a, "source"_a, "Takes over an expert's weights from the bytes that `read` wrote; its bias stays.")
      .def_prop_ro(
          "memory",
          [](const kt::experts& self) {
            std::vector<place> all;
            for (const kt::region& r : self.memory()) all.push_back(of_region(r));
            return all;
          },
          "(address, bytes) of all experts: of each slice gate_up, its bias, down, its bias; (0, 0) for none.")
      .def(
          "map",
          [](kt::experts& self, const std::vector<place>& memory, const nb::object&) {
            std::vector<kt::region> all;
            for (const auto& [data, bytes] : memory) all.push_back({address<void>(data), bytes});
            self.map(all);
          },
          "memory"_a, "owner"_a, nb::keep_alive<1, 3>(),
          "Reads weights from memory as `memory` returned it, which `owner` holds, and never writes to it.")
      .def_prop_ro("mapped", &kt::experts::mapped, "Whether weights lie in memory of another and cannot be written to.")
      .def(
          "fill",
          [](kt::experts& self, int expert, unsigned char byte) {
            check_expert(self, expert);
            self.fill(expert, byte);
          },
          "expert"_a, "byte"_a, "Overwrites an expert's weights.")
      .def(
          "release",
          [](const kt::experts& self, int expert) {
            check_expert(self, expert);
            self.release(expert);
          },
          "expert"_a, "Gives an expert's memory back until it is packed or copied to again.")
      .def_prop_ro("expert_nbytes", &kt::experts::expert_bytes)
      .def_prop_ro("nbytes", &kt::experts::bytes);

  nb::class_<packed_linear>(m, "Linear")
      .def(nb::init<const kt::weight_format&, std::size_t, std::size_t, int>(), "format"_a, "out_features"_a,
           "in_features"_a, "heads"_a = 1)
      .def(
          "pack",
          [](packed_linear& self, std::uintptr_t weight, strides2 s, kt::dtype type, int head) {
            self.check(head);
            self.weight.pack(head, view(weight, type, {0, std::get<0>(s), std::get<1>(s)}));
          },
          "weight"_a, "strides"_a, "type"_a, "head"_a = 0, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "pack_quantized",
          [](packed_linear& self, const quantized& weight, int head) {
            const nb::gil_scoped_release nogil;
            self.check(head);
            self.weight.pack(head, view(weight));
          },
          "weight"_a, "head"_a = 0)
      .def(
          "pack_bias",
          [](packed_linear& self, std::uintptr_t data, std::ptrdiff_t stride, kt::dtype type) {
            self.weight.pack_bias(bias(data, type, {0, stride}));
          },
          "bias"_a, "stride"_a, "type"_a)
      .def(
          "unpack",
          [](const packed_linear& self, std::uintptr_t weight, strides2 s, kt::dtype type, int head) {
            self.check(head);
            self.weight.unpack(head, view(weight, type, {0, std::get<0>(s), std::get<1>(s)}));
          },
          "weight"_a, "strides"_a, "type"_a, "head"_a = 0, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro(
          "memory",
          [](const packed_linear& self) {
            return std::vector<place>{of_region(self.weight.memory()), of_region(self.weight.bias_memory())};
          },
          "(address, bytes) of the weight and of its bias; (0, 0) for none.")
      .def(
          "map",
          [](packed_linear& self, const std::vector<place>& memory, const nb::object&) {
            const std::size_t bias = self.heads * self.weight.panels() * kt::panel_columns * sizeof(float);
            if (memory.size() != 2 || std::get<1>(memory[0]) != self.weight.memory().bytes ||
                (std::get<1>(memory[1]) != 0 && std::get<1>(memory[1]) != bias)) {
              throw std::invalid_argument("the memory to map is not as long as this layer is");
            }
            self.weight.map(address<void>(std::get<0>(memory[0])), address<void>(std::get<0>(memory[1])));
          },
          "memory"_a, "owner"_a, nb::keep_alive<1, 3>(),
          "Reads the weight from memory as `memory` returned it, which `owner` holds, and never writes to it.")
      .def_prop_ro("format", [](const packed_linear& self) { return self.weight.layout().format; })
      .def_prop_ro("nbytes", [](const packed_linear& self) { return self.weight.bytes(); });

  m.def(
      "use_openmp",
      [](std::uintptr_t parallel, std::uintptr_t thread, std::uintptr_t threads, std::uintptr_t most_threads) {
        static kt::openmp runtime;
        if (!parallel) return kt::use_openmp(nullptr);
        using count = int (*)();
        runtime = {reinterpret_cast<decltype(kt::openmp::parallel)>(parallel), reinterpret_cast<count>(thread),
                   reinterpret_cast<count>(threads), reinterpret_cast<count>(most_threads)};
        kt::use_openmp(&runtime);
      },
      "parallel"_a, "thread"_a, "threads"_a, "most_threads"_a);
  m.def("use_openmp_here", &kt::use_openmp_here, "allowed"_a);

  nb::class_<kt::context>(m, "Context")
      .def(
          "__init__",
          [](kt::context* self, int threads, const std::string& sys_root) {
            if (threads < 1) {
              throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be 1 or more");
            }
            new (self) kt::context(places(threads, kt::read_topology(sys_root)));
          },
          "threads"_a, "sys_root"_a = "/sys")
      .def_prop_ro("threads", &kt::context::threads)
      .def("moe",
           [](kt::context& self, const kt::experts& experts, const std::string& isa, std::size_t tokens, int top_k,
              std::uintptr_t hidden, kt::dtype hidden_type, std::size_t hidden_stride, std::uintptr_t ids,
              bool ids_are_64_bit, std::uintptr_t weights, kt::dtype weights_type, std::uintptr_t out,
              std::size_t out_stride) {
             const kt::kernel_table& kernels = kt::kernels_for(isa_named(isa), experts.format.kind, hidden_type);
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
      .def("linear",
           [](kt::context& self, const packed_linear& w, const std::string& isa, std::size_t rows, kt::dtype type,
              const heads_place& in, const heads_place& out) {
             const kt::kernel_table& kernels = kt::kernels_for(isa_named(isa), w.weight.layout().format.kind, type);
             const auto [from, in_stride, in_head_stride] = in;
             const auto [to, out_stride, out_head_stride] = out;
             const nb::gil_scoped_release nogil;
             self.linear(w.weight, kernels,
                         {rows, w.k, w.features, address<void>(from), type, in_stride, address<void>(to), out_stride,
                          static_cast<std::size_t>(w.heads), in_head_stride, out_head_stride});
           })
      .def(
          "norm",
          [](kt::context& self, const std::string& isa, const std::tuple<std::size_t, std::size_t, std::size_t>& shape,
             kt::dtype type, const rows_place& in, const rows_place& out, const norm_weight& weight,
             const std::tuple<std::uintptr_t, std::uintptr_t>& addition) {
            const auto [groups, rows, size] = shape;
            const auto [from, group_stride, row_stride] = in;
            const auto [to, out_group_stride, out_row_stride] = out;
            const auto [addend, sum] = addition;
            const nb::gil_scoped_release nogil;
            self.norm(*isa_named(isa).kernels,
                      {address<void>(from), group_stride, row_stride, address<void>(to), out_group_stride,
                       out_row_stride, rows, type, size, view(weight), address<void>(addend), address<void>(sum)},
                      groups * rows);
          },
          "isa"_a, "shape"_a, "type"_a, "rows"_a, "out"_a, "weight"_a, "addition"_a,
          "Root-mean-square normalisation. shape: (groups, rows of each, elements of a row). rows, out: (address, "
          "stride of groups, of rows), in elements. weight: (address, type, offset, epsilon, round_first). addition: "
          "addresses of what is added first, lying as `rows`, and of where the sums go, lying as `out`, or zeros.")
      .def(
          "rotary",
          [](kt::context& self, const std::string& isa,
             const std::tuple<std::size_t, std::size_t, std::size_t, std::size_t, std::size_t>& shape, kt::dtype type,
             const attention_place& heads, const attention_place& out, std::uintptr_t cos, std::uintptr_t sin,
             const std::tuple<std::ptrdiff_t, std::ptrdiff_t>& angle_strides, const norm_weight& norm) {
            const auto [sequences, positions, count, size, rotated] = shape;
            const auto [from, a, b, c] = heads;
            const auto [to, d, e, f] = out;
            const auto [g, h] = angle_strides;
            const nb::gil_scoped_release nogil;
            self.rotary(*isa_named(isa).kernels,
                        {address<void>(from),
                         {a, b, c},
                         address<void>(to),
                         {d, e, f},
                         positions,
                         count,
                         type,
                         size,
                         rotated,
                         address<void>(cos),
                         address<void>(sin),
                         {g, h},
                         view(norm)},
                        sequences * positions * count);
          },
          "isa"_a, "shape"_a, "type"_a, "heads"_a, "out"_a, "cos"_a, "sin"_a, "angle_strides"_a, "norm"_a,
          "Rotary embedding. shape: (sequences, positions, heads, elements of a head, how many of them are rotated). "
          "heads, out: (address, strides of sequence, position and head). cos, sin: addresses, of the type of heads. "
          "angle_strides: of sequence and position. norm: as of `norm`, or address 0.")
      .def(
          "attention",
          [](kt::context& self, const std::string& isa, const std::tuple<int, int, int>& heads,
             const std::tuple<std::size_t, std::size_t>& sizes, kt::dtype type, kt::dtype kv_type,
             const attention_place& query, const attention_place& key, const attention_place& value,
             const attention_place& out, const attention_counts& counts, const block_table& table,
             const attention_mask& mask, const attention_rule& rule, const attention_scales& key_scales,
             const attention_scales& value_scales) {
            kt::attention_arguments a;
            std::tie(a.sequences, a.query_heads, a.kv_heads) = heads;
            std::tie(a.key_size, a.value_size) = sizes;
            a.type = type;
            a.kv_type = kv_type;
            a.query = view(query);
            a.key = view(key);
            a.value = view(value);
            a.key_scales = view(key_scales);
            a.value_scales = view(value_scales);
            a.out = address<void>(std::get<0>(out));
            a.out_strides = strides_of(out);
            std::uintptr_t starts = 0, lengths = 0, sinks = 0;
            std::tie(a.queries, a.positions, a.first, starts, lengths) = counts;
            a.query_starts = address<std::int64_t>(starts);
            a.lengths = address<std::int64_t>(lengths);
            a.block_table = address<std::int32_t>(std::get<0>(table));
            a.table_stride = std::get<1>(table);
            a.block_size = std::get<2>(table);
            a.mask = view(std::get<0>(mask));
            a.mask_kind = std::get<1>(mask);
            std::tie(a.causal, a.window, a.scale, a.softcap, sinks) = rule;
            a.sinks = address<float>(sinks);
            const nb::gil_scoped_release nogil;
            self.attention(*isa_named(isa).kernels, a);
          },
          "isa"_a, "heads"_a, "sizes"_a, "type"_a, "kv_type"_a, "query"_a, "key"_a, "value"_a, "out"_a, "counts"_a,
          "table"_a, "mask"_a, "rule"_a, "key_scales"_a, "value_scales"_a,
          "Softmax attention. heads: (sequences, query heads, heads of keys). sizes: of a key, of a value. query, key, "
          "value, out: (address, strides of sequence, head and position). counts: (queries and positions of each "
          "sequence, position of the first query or -1, addresses or 0 of int64 query starts and lengths). "
          "table: (address or 0, stride, block size). mask: (as query, kind). rule: (causal, window, scale, softcap, "
          "address of sinks). key_scales, value_scales: (as query, elements that share a scale, 0 where there "
          "are none); where there are, keys or values are int8, and kv_type says nothing.")
      .def(
          "store_kv",
          [](kt::context& self, const std::string& isa,
             const std::tuple<std::size_t, std::size_t, std::size_t, std::size_t>& shape, kt::dtype type,
             const rows_place& rows, std::uintptr_t slots, std::int64_t block_size, const attention_place& codes,
             const attention_place& scales) {
            kt::store_kv_arguments a;
            std::tie(a.tokens, a.heads, a.size, a.group) = shape;
            a.type = type;
            a.rows = address<void>(std::get<0>(rows));
            a.token_stride = std::get<1>(rows);
            a.head_stride = std::get<2>(rows);
            a.slots = address<std::int64_t>(slots);
            a.block_size = block_size;
            a.codes = address<std::int8_t>(std::get<0>(codes));
            a.code_strides = strides_of(codes);
            a.scales = address<float>(std::get<0>(scales));
            a.scale_strides = strides_of(scales);
            const nb::gil_scoped_release nogil;
            self.store_kv(*isa_named(isa).kernels, a);
          },
          "isa"_a, "shape"_a, "type"_a, "rows"_a, "slots"_a, "block_size"_a, "codes"_a, "scales"_a,
          "Quantises rows to int8. shape: (tokens, heads, elements of a row, elements that share a scale). rows: "
          "(address, stride of tokens, of heads). slots: address of int64, negative ones are left out. codes, scales: "
          "(address, strides of block, head and position).")
      .def(
          "read_bandwidth",
          [](kt::context& self, const std::string& isa, std::size_t bytes, int repeats) {
            return self.read_bandwidth(*isa_named(isa).kernels, bytes, repeats);
          },
          "isa"_a, "bytes"_a, "repeats"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Bytes per second, the best of `repeats` reads of `bytes`, which are kept until a call with more.")
      .def(
          "arithmetic",
          [](kt::context& self, const std::string& isa, bool int8, double seconds) {
            return self.arithmetic(*isa_named(isa).kernels, int8, seconds);
          },
          "isa"_a, "int8"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Operations per second of the products that the kernels use, of floats or of int8, in `seconds`.");
  bind_program(m);
  bind_watch(m);
}
