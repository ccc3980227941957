"""A weight in the CPU's panels as rows and columns, and back, on whatever device its bytes are.

`native/include/kt/layout.h` says how panels lie in memory. All here are views and copies: no value changes.

Shape suffixes: N rows (output features), K columns (input features), G groups of columns, J kinds of rows (gate and up,
or one), P panels, D rows in the order of panels (32 P), B bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_PANEL = 32  # rows of a panel
_STEP = 32  # columns are padded to multiples of it


@dataclass(frozen=True, slots=True)
class Fields:
    """What a weight is made of: codes [J, N, K], one a byte if there are scales; scales and zeros [J, N, G]."""

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Fields:
        """Return what becomes of each of the tensors that are there."""
        return Fields(*(None if t is None else change(t) for t in (self.codes, self.scales, self.zeros)))  # type: ignore[arg-type]

    def rows(self, begin: int, end: int) -> Fields:
        """Return some rows of each kind."""
        return self.map(lambda t: t[:, begin:end])

    def columns(self, begin: int, end: int, groups: slice) -> Fields:
        """Return some columns, and the groups that they are in."""
        of_groups = (None if t is None else t[:, :, groups] for t in (self.scales, self.zeros))
        return Fields(self.codes[:, :, begin:end], *of_groups)

    @staticmethod
    def cat(parts: list[Fields], dim: int) -> Fields:
        """Return several one after the other."""

        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            return torch.cat([t for t in tensors if t is not None], dim) if tensors[0] is not None else None

        codes = torch.cat([p.codes for p in parts], dim)
        return Fields(codes, joined([p.scales for p in parts]), joined([p.zeros for p in parts]))


@dataclass(frozen=True, slots=True)
class Panels:
    """One weight of one expert as the CPU has it.

    layout: of its format. group: columns that share a scale, 0 is all. kinds: 2 where a panel has 16 rows of gate and
    the same of up. rows: of each kind. columns: of the weight.
    """

    layout: str
    group: int
    scale_dtype: torch.dtype | None
    has_zeros: bool
    kinds: int
    rows: int
    columns: int

    def read(self, raw_B: Tensor) -> Fields:
        """Return the weight whose panels have these bytes, uint8."""
        raw_PB = raw_B.view(-1, self._panel_bytes)
        pieces = [self._cut(piece) for piece in self._pieces(raw_PB)]
        codes, scales, zeros = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
        codes_DK = _CODES[self.layout].read(codes)[:, : self.columns]
        return Fields(
            codes_DK,
            None if self.scale_dtype is None else _by_row(scales.view(self.scale_dtype)),
            _by_row(zeros) if self.has_zeros else None,
        ).map(lambda t: rows_in_order(t, self.kinds, self.rows))

    def write(self, weight: Fields, size: int) -> Tensor:
        """Return the bytes of the panels of a weight, uint8. size: how many there are."""
        panels = size // self._panel_bytes
        placed = weight.map(lambda t: rows_in_panels(t, panels))
        codes_DK = F.pad(placed.codes, (0, -self.columns % _STEP))
        codes_PB = _CODES[self.layout].write(codes_DK, panels)
        fields = [_by_panel(t, panels) for t in (placed.scales, placed.zeros) if t is not None]
        full, each = self._full_groups, self._code_bytes(self._group)
        pieces = []
        if full:
            codes_PGB = torch.unflatten(codes_PB[:, : full * each], 1, (full, each))
            pieces.append(torch.cat([codes_PGB, *(f[:, :full] for f in fields)], 2).flatten(1))
        if self._rest:
            pieces.append(torch.cat([codes_PB[:, full * each :], *(f[:, full] for f in fields)], 1))
        return torch.cat(pieces, 1).flatten()

    @property
    def _padded(self) -> int:
        return -(-self.columns // _STEP) * _STEP

    @property
    def _group(self) -> int:
        return self.group or self._padded

    @property
    def _full_groups(self) -> int:
        return self._padded // self._group

    @property
    def _rest(self) -> int:
        """Columns of the last group, if it is shorter than the others."""
        return self._padded % self._group

    @property
    def _scale_bytes(self) -> int:
        return _PANEL * (self.scale_dtype.itemsize if self.scale_dtype else 0)

    @property
    def _field_bytes(self) -> int:
        """Bytes of a group beside its codes."""
        return self._scale_bytes + (_PANEL if self.has_zeros else 0)

    @property
    def _panel_bytes(self) -> int:
        groups = self._full_groups + bool(self._rest)
        return self._code_bytes(self._padded) + groups * self._field_bytes

    def _code_bytes(self, columns: int) -> int:
        return columns * _PANEL * _CODES[self.layout].bits // 8

    def _pieces(self, raw_PB: Tensor) -> list[Tensor]:
        """Return the groups [P, G, bytes of a group] of one length, and then the last one if it is shorter."""
        each = self._code_bytes(self._group) + self._field_bytes
        size = self._full_groups * each
        found = [torch.unflatten(raw_PB[:, :size], 1, (-1, each))] if size else []
        return [*found, raw_PB[:, size:].unsqueeze(1)] if self._rest else found

    def _cut(self, piece: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes [P, bytes], scales [P, G, bytes] and zeros [P, G, bytes] of groups."""
        at = piece.shape[2] - self._field_bytes
        end = at + self._scale_bytes
        return piece[:, :, :at].flatten(1), piece[:, :, at:end], piece[:, :, end:]


def rows_in_order(t: Tensor, kinds: int, rows: int) -> Tensor:
    """Return [J, N, ...] of a tensor [D, ...]."""
    return torch.unflatten(t, 0, (-1, kinds, _PANEL // kinds)).transpose(0, 1).flatten(1, 2)[:, :rows]


def rows_in_panels(t: Tensor, panels: int) -> Tensor:
    """Return [D, ...] of a tensor [J, N, ...], with zeros for rows of panels that it does not have."""
    per_panel = _PANEL // t.shape[0]
    padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, panels * per_panel - t.shape[1]))
    return torch.unflatten(padded, 1, (panels, per_panel)).transpose(0, 1).flatten(0, 2)


def _by_row(t_PGX: Tensor) -> Tensor:
    """Return [D, G] of what panels have for each group."""
    return t_PGX.transpose(1, 2).flatten(0, 1)


def _by_panel(t_DG: Tensor, panels: int) -> Tensor:
    """Return the bytes [P, G, bytes] that panels have for each group."""
    return torch.unflatten(t_DG, 0, (panels, _PANEL)).transpose(1, 2).contiguous().view(torch.uint8)


class _Codes(Protocol):
    """The codes of panels in one layout; `bits` each."""

    @property
    def bits(self) -> int: ...

    def read(self, codes_PB: Tensor) -> Tensor:
        """Return codes [D, K]."""
        ...

    def write(self, codes_DK: Tensor, panels: int) -> Tensor:
        """Return their bytes [P, B]."""
        ...


@dataclass(frozen=True, slots=True)
class _Floats:
    """[K / 2][32][2] for bf16, else [K][32]; `pair` is that 2, or 1."""

    dtype: torch.dtype
    pair: int

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    def read(self, codes_PB: Tensor) -> Tensor:
        lanes = torch.unflatten(codes_PB.view(self.dtype), 1, (-1, _PANEL, self.pair))
        return lanes.transpose(1, 2).flatten(2).flatten(0, 1)

    def write(self, codes_DK: Tensor, panels: int) -> Tensor:
        lanes = codes_DK.reshape(panels, _PANEL, -1, self.pair).transpose(1, 2)
        return lanes.flatten(1).contiguous().view(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """[K / 2][4][2][4][2]: rows 4 i + {0, 16}, row, parity of the column."""

    dtype: torch.dtype
    bits = 8

    def read(self, codes_PB: Tensor) -> Tensor:
        codes = torch.unflatten(codes_PB.view(self.dtype), 1, (-1, 4, 2, 4, 2))
        return codes.permute(0, 3, 2, 4, 1, 5).flatten(4).flatten(0, 3)

    def write(self, codes_DK: Tensor, panels: int) -> Tensor:
        codes = codes_DK.reshape(panels, 2, 4, 4, -1, 2).permute(0, 4, 2, 1, 3, 5)
        return codes.flatten(1).contiguous().view(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Nibbles:
    """[K / 4][16][2][2] bytes: row, parity of the column, half of four columns; rows from 16 on in the high bits."""

    bits = 4

    def read(self, codes_PB: Tensor) -> Tensor:
        codes = torch.unflatten(torch.stack((codes_PB & 0xF, codes_PB >> 4), 1), 2, (-1, 16, 2, 2))
        return codes.permute(0, 1, 3, 2, 5, 4).flatten(3).flatten(0, 2)

    def write(self, codes_DK: Tensor, panels: int) -> Tensor:
        codes = codes_DK.reshape(panels, 2, 16, -1, 2, 2).permute(0, 1, 3, 2, 5, 4)
        return codes[:, 0].bitwise_or(codes[:, 1] << 4).flatten(1)


_CODES: dict[str, _Codes] = {
    "f32": _Floats(torch.float32, 1),
    "f16": _Floats(torch.float16, 1),
    "bf16": _Floats(torch.bfloat16, 2),
    "int8": _Bytes(torch.int8),
    "fp8": _Bytes(torch.uint8),
    "int4": _Nibbles(),
    "mxfp4": _Nibbles(),
}
