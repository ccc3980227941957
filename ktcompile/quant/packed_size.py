"""How many bytes packed experts take: the arithmetic of native/include/kt/layout.h, without packing anything."""

from __future__ import annotations

from dataclasses import dataclass

from ktcompile.quant.formats import WeightFormat

_PANEL = 32  # columns of a panel
_SLICE_STEP = 128  # experts are cut between NUMA nodes at multiples of it
_HUGE_PAGE = 2 << 20

# Of one column and one group: its scale, then the column's sum (int8_dyn).
_SCALE_BYTES = {"int8": 4, "int8_dyn": 4 + 4, "int4": 2, "int4_dyn": 2, "fp8": 4, "mxfp4": 1}
_CODE_BITS = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "int8": 8,
    "int8_dyn": 8,
    "int4": 4,
    "int4_dyn": 4,
    "fp8": 8,
    "mxfp4": 4,
}


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One expert. gated: it has a gate beside the up product. biased: both products have biases."""

    hidden_size: int
    intermediate_size: int
    gated: bool = True
    biased: bool = False

    @property
    def weights(self) -> int:
        """Elements of its matrices."""
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size


def expert_bytes(weight_format: WeightFormat, shape: ExpertShape, nodes: int = 1) -> int:
    """Return the bytes of one packed expert, with its scales, padding and biases. nodes: NUMA nodes it is cut over."""
    return sum(_buffers(weight_format, shape, nodes))


def layer_bytes(weight_format: WeightFormat, shape: ExpertShape, num_experts: int, nodes: int = 1) -> int:
    """Return what a layer of packed experts allocates: that of its experts, each buffer in whole huge pages."""
    return sum(_whole_pages(num_experts * size) for size in _buffers(weight_format, shape, nodes))


def _buffers(weight_format: WeightFormat, shape: ExpertShape, nodes: int) -> list[int]:
    """Return the bytes of one expert in each allocation: of each node its weights, then its biases."""
    step = _k_step(weight_format)
    steps = _ceil_div(shape.intermediate_size, _SLICE_STEP)
    count = max(1, min(nodes, steps))
    sizes = []
    for i in range(count):
        begin, end = (min(shape.intermediate_size, steps * n // count * _SLICE_STEP) for n in (i, i + 1))
        up_panels = _round_up(end - begin, step) // (_PANEL // 2 if shape.gated else _PANEL)
        down_panels = _ceil_div(shape.hidden_size, _PANEL)
        sizes.append(up_panels * _panel_bytes(weight_format, shape.hidden_size))
        sizes.append(down_panels * _panel_bytes(weight_format, end - begin))
        if shape.biased:
            sizes.append(up_panels * _PANEL * 4)
            sizes += [down_panels * _PANEL * 4] if i == 0 else []
    return sizes


def _panel_bytes(weight_format: WeightFormat, features: int) -> int:
    """Return the bytes of 32 columns. features: of the reduction, before padding."""
    columns = _round_up(features, _k_step(weight_format))
    codes = columns * _PANEL * _CODE_BITS[weight_format.layout] // 8
    if weight_format.group_size is None:
        return codes
    groups = _ceil_div(columns, weight_format.group_size or columns)
    scale = _SCALE_BYTES[weight_format.layout] + (1 if weight_format.has_zero_points else 0)
    return codes + groups * _PANEL * scale


def _k_step(weight_format: WeightFormat) -> int:
    return 64 if weight_format.layout == "int8_dyn" else 32


def _whole_pages(size: int) -> int:
    return _round_up(size, _HUGE_PAGE) if size >= _HUGE_PAGE else size


def _round_up(value: int, step: int) -> int:
    return _ceil_div(value, step) * step


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
