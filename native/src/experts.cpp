#include <kt/experts.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>

namespace kt {
namespace {

// Slices begin where a group of any format does.
constexpr std::size_t slice_step = 128;

}  // namespace

experts::experts(const experts_shape& s, const weight_format& f, const std::vector<int>& nodes)
    : shape(s), format(f), tokens(static_cast<std::size_t>(s.num_experts)) {
  const std::size_t whole = s.intermediate_size, steps = (whole + slice_step - 1) / slice_step;
  const std::size_t count = std::clamp<std::size_t>(nodes.size(), 1, steps);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t begin = std::min(whole, steps * i / count * slice_step);
    const std::size_t features = std::min(whole, steps * (i + 1) / count * slice_step) - begin;
    const column_map up =
        s.act.gated ? column_map::gated(begin, features, whole, s.interleaved) : column_map::plain(begin, features);
    const int node = nodes.empty() ? -1 : nodes[i];
    // The activation fills all of the second reduction's K, padding included.
    const std::size_t up_panels = panel_layout::padded(f.kind, features) / up.per_panel();
    const std::size_t down_panels = (s.hidden_size + panel_columns - 1) / panel_columns;
    const column_map down = column_map::plain(0, s.hidden_size);
    slices.push_back({packed_weight(f, s.num_experts, up_panels, 0, s.hidden_size, up, node),
                      packed_weight(f, s.num_experts, down_panels, begin, features, down, node)});
  }
}

void experts::pack_bias(const bias_view& gate_up, const bias_view& down) {
  for (expert_slice& s : slices) s.gate_up.pack_bias(gate_up);
  slices.front().down.pack_bias(down);  // it is added once
}

void experts::unpack(int expert, const weight_view& gate_up, const weight_view& down) const {
  for (const expert_slice& s : slices) {
    s.gate_up.unpack(expert, gate_up);
    s.down.unpack(expert, down);
  }
}

std::size_t experts::bytes() const {
  std::size_t n = 0;
  for (const expert_slice& s : slices) n += s.gate_up.bytes() + s.down.bytes();
  return n;
}

std::size_t experts::expert_bytes() const {
  std::size_t n = 0;
  for (const expert_slice& s : slices) n += s.gate_up.expert_bytes() + s.down.expert_bytes();
  return n;
}

void experts::copy(int expert, const experts& from, int from_expert) {
  const auto bytes = [](const experts& e) {
    std::vector<std::size_t> all;
    for (const expert_slice& s : e.slices) all.insert(all.end(), {s.gate_up.expert_bytes(), s.down.expert_bytes()});
    return all;
  };
  const auto format = [](const weight_format& f) { return std::tuple(f.kind, f.group, f.scale, f.zero_points); };
  const auto sizes = [](const experts_shape& s) {
    return std::tuple(s.hidden_size, s.intermediate_size, s.act.gated, s.interleaved);
  };
  if (format(this->format) != format(from.format) || sizes(shape) != sizes(from.shape) || bytes(*this) != bytes(from))
    throw std::invalid_argument("experts are copied between layers of the same shape, format and slices only");
  for (std::size_t i = 0; i < slices.size(); ++i) {
    slices[i].gate_up.copy(expert, from.slices[i].gate_up, from_expert);
    slices[i].down.copy(expert, from.slices[i].down, from_expert);
  }
}

std::vector<std::size_t> experts::parts() const {
  std::vector<std::size_t> all;
  for (const expert_slice& s : slices)
    for (const packed_weight* w : {&s.gate_up, &s.down}) all.insert(all.end(), {w->expert_bytes(), w->bias_bytes()});
  return all;
}

std::vector<region> experts::memory() const {
  std::vector<region> all;
  for (const expert_slice& s : slices)
    for (const packed_weight* w : {&s.gate_up, &s.down}) all.insert(all.end(), {w->memory(), w->bias_memory()});
  return all;
}

void experts::map(const std::vector<region>& memory) {
  const std::vector<region> own = this->memory();
  bool fits = memory.size() == own.size();
  for (std::size_t i = 0; fits && i < own.size(); i += 2) {
    const packed_weight& w = i % 4 ? slices[i / 4].down : slices[i / 4].gate_up;
    const std::size_t bias = shape.num_experts * w.panels() * panel_columns * sizeof(float);
    fits = memory[i].bytes == own[i].bytes && (memory[i + 1].bytes == 0 || memory[i + 1].bytes == bias);
  }
  if (!fits) throw std::invalid_argument("the memory to map is not as long as these experts are");
  for (std::size_t i = 0; i < own.size(); i += 2) {
    packed_weight& w = i % 4 ? slices[i / 4].down : slices[i / 4].gate_up;
    w.map(memory[i].data, memory[i + 1].bytes ? memory[i + 1].data : nullptr);
  }
}

void experts::read(int expert, char* to) const {
  for (const expert_slice& s : slices) to = s.down.read(expert, s.gate_up.read(expert, to));
}

void experts::write(int expert, const char* from) {
  for (expert_slice& s : slices) from = s.down.write(expert, s.gate_up.write(expert, from));
}

void experts::fill(int expert, unsigned char byte) {
  for (expert_slice& s : slices) {
    s.gate_up.fill(expert, byte);
    s.down.fill(expert, byte);
  }
}

void experts::release(int expert) const {
  for (const expert_slice& s : slices) {
    s.gate_up.release(expert);
    s.down.release(expert);
  }
}

}  // namespace kt
