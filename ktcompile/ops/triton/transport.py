"""An expert's bytes, as the CPU has them, and its weights as the kernels read them.

An expert is sent as the bytes of its panels: they are as few as the format allows, and the CPU does no more than copy
them. To put them in another order is the device's work, on arrival and before it sends them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile import _native
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.triton.panels import Fields, Panels, rows_in_order
from ktcompile.ops.triton.weights import HALVED, DeviceWeight, check_layout, empty_weight, from_chunks, to_chunks
from ktcompile.quant import WeightFormat

_SCALES = {
    _native.ScaleType.none: None,
    _native.ScaleType.f32: torch.float32,
    _native.ScaleType.f16: torch.float16,
    _native.ScaleType.bf16: torch.bfloat16,
    _native.ScaleType.e8m0: torch.uint8,
}


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """One weight of one expert in device memory, and its bias, as views without the dimension of slots."""

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMemory:
    """Device memory for experts of one layout: what `ktcompile.ops.triton.DeviceExperts` has beside an activation."""

    gate_up: DeviceWeight
    down: DeviceWeight
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Return all tensors that it is made of."""
        both = [t for w in (self.gate_up, self.down) for t in (w.codes, w.scales, w.zeros)]
        return [t for t in (*both, self.gate_up_bias, self.down_bias) if t is not None]

    def slot(self, number: int) -> tuple[ExpertSlot, ExpertSlot]:
        """Return where gate_up and down of one expert lie."""
        return _slot(self.gate_up, self.gate_up_bias, number), _slot(self.down, self.down_bias, number)


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What an expert's bytes are. Layers of the same one can share memory.

    parts: bytes of each slice's gate_up, its bias, down and its bias, one after the other. slices: of `down`, how many
    columns each has, and of gate_up, how many rows of gate. scale_dtype: of scales as they are stored, uint8 exponents
    for mxfp4. On the device all rows of gate come first, then those of up.
    """

    format: WeightFormat
    scale_dtype: torch.dtype | None
    hidden_size: int
    intermediate_size: int
    gated: bool
    parts: tuple[int, ...]
    slices: tuple[int, ...]

    @classmethod
    def of(cls, experts: PackedExperts) -> ExpertLayout:
        """Return the layout of a layer's experts. ValueError: the GPU kernels do not have its format."""
        check_layout(experts.format, experts.label)
        native = experts.native
        scale_dtype = _SCALES[native.format.scale]
        sizes = (experts.hidden_size, experts.intermediate_size)
        gated = experts.spec.activation.gated
        return cls(experts.format, scale_dtype, *sizes, gated, tuple(native.parts), tuple(native.slices))

    @property
    def nbytes(self) -> int:
        """Bytes of an expert with its biases."""
        return sum(self.parts)

    def memory(self, slots: int, device: torch.device) -> ExpertMemory:
        """Return memory for so many experts."""
        hidden, intermediate, rows = self.hidden_size, self.intermediate_size, self._kinds * self.intermediate_size
        gate_up = empty_weight(self.format, (slots, rows, hidden), self.scale_dtype, device)
        down = empty_weight(self.format, (slots, hidden, intermediate), self.scale_dtype, device)
        biases = (torch.empty(slots, n, device=device) if self.parts[1] else None for n in (rows, hidden))
        return ExpertMemory(gate_up, down, *biases)

    def unpack(self, raw: Tensor, gate_up: ExpertSlot, down: ExpertSlot) -> None:
        """Write an expert to where the kernels read it. raw: its bytes, uint8 [nbytes], on the same device."""
        parts = torch.split(raw, list(self.parts))
        weights = [
            (first.read(parts[4 * i]), second.read(parts[4 * i + 2]))
            for i, (first, second) in enumerate(self._panels())
        ]
        # Slices of gate_up are some rows of both kinds, those of down some columns.
        self._store(Fields.cat([first for first, _ in weights], 1), gate_up)
        self._store(Fields.cat([second for _, second in weights], 2), down)
        if gate_up.bias is None or down.bias is None:
            return
        biases = [rows_in_order(_floats(parts[4 * i + 1]), self._kinds, n) for i, n in enumerate(self.slices)]
        gate_up.bias.copy_(torch.cat(biases, 1).flatten())
        down.bias.copy_(_floats(parts[3])[: self.hidden_size])  # one slice has it, since it is added once

    def pack(self, gate_up: ExpertSlot, down: ExpertSlot) -> Tensor:
        """Return the bytes of an expert, uint8 [nbytes], with zeros for its biases, which the CPU has kept."""
        first = self._load(gate_up, self.hidden_size).map(lambda t: torch.unflatten(t, 0, (self._kinds, -1)))
        second = self._load(down, self.intermediate_size).map(lambda t: t.unsqueeze(0))
        found, at = [], 0
        for i, (panels, size) in enumerate(zip(self._panels(), self.slices, strict=True)):
            weights = (first.rows(at, at + size), self._columns(second, at, at + size))
            for lies, weight, (nbytes, bias) in zip(panels, weights, self._sizes(i), strict=True):
                found += [lies.write(weight, nbytes), weight.codes.new_zeros(bias, dtype=torch.uint8)]
            at += size
        return torch.cat(found)

    @property
    def _kinds(self) -> int:
        return 2 if self.gated else 1

    def _panels(self) -> Iterator[tuple[Panels, Panels]]:
        """Yield how gate_up and down of each slice lie."""
        record = self.format
        kind = (record.layout, record.group_size or 0, self.scale_dtype, record.has_zero_points)
        for size in self.slices:
            yield (
                Panels(*kind, kinds=self._kinds, rows=size, columns=self.hidden_size),
                Panels(*kind, kinds=1, rows=self.hidden_size, columns=size),
            )

    def _sizes(self, i: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the bytes of a slice's gate_up and its bias, and of its down and its bias."""
        gate_up, gate_up_bias, down, down_bias = self.parts[4 * i : 4 * i + 4]
        return (gate_up, gate_up_bias), (down, down_bias)

    def _columns(self, weight: Fields, begin: int, end: int) -> Fields:
        """Return the columns [begin, end) of a weight; where a group is all columns, its scale is that of any part."""
        group = self.format.group_size
        return weight.columns(begin, end, slice(begin // group, -(-end // group)) if group else slice(None))

    def _store(self, weight: Fields, slot: ExpertSlot) -> None:
        codes_NK = weight.codes.flatten(0, 1)
        slot.codes.copy_(to_chunks(codes_NK) if self.format.layout in HALVED else codes_NK)
        for source, target in ((weight.scales, slot.scales), (weight.zeros, slot.zeros)):
            if source is not None and target is not None:
                target.copy_(source[..., : len(target)].flatten(0, 1).mT)

    def _load(self, slot: ExpertSlot, columns: int) -> Fields:
        codes_NK = from_chunks(slot.codes, columns) if self.format.layout in HALVED else slot.codes
        return Fields(codes_NK, *(None if t is None else t.mT for t in (slot.scales, slot.zeros)))


def _slot(weight: DeviceWeight, bias: Tensor | None, number: int) -> ExpertSlot:
    optional = (None if t is None else t[number] for t in (weight.scales, weight.zeros, bias))
    return ExpertSlot(weight.codes[number], *optional)


def _floats(raw: Tensor) -> Tensor:
    return raw.view(torch.float32)
