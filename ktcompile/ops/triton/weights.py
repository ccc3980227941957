"""Weights as the kernels read them.

Shape suffixes: S resident experts, N rows (output features), K columns (input features), G groups, C chunks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcompile.quant import FORMATS, QuantizedWeight, WeightFormat

# Columns of a chunk; see kernels/weights.py.
CHUNK = 64
LAYOUTS = ("f32", "f16", "bf16", "int8", "fp8", "int4", "mxfp4")
HALVED = ("int4", "mxfp4")  # two codes a byte


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeight:
    """A weight [S, N, K] in device memory.

    codes: the weight itself, of any strides, for formats without scales; [S, N, K], int8, and uint8 for fp8; uint8
    [S, C, N, 32] for four bits, where byte j of a chunk has column j in its low bits and j + 32 in its high ones.
    scales: [S, G, N], bf16, fp16 or fp32, whichever is the shortest that is exact; uint8 exponents for mxfp4.
    zeros: uint8 [S, G, N], or None.
    """

    format: WeightFormat
    shape: tuple[int, int, int]
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def kernel_format(self) -> str:
        return "plain" if self.scales is None else self.format.layout

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of an expert, a row and a column. Chunks of four bits have a fixed layout, without the latter two."""
        if self.codes.dim() == 4:
            return self.codes.stride(0), 0, 0
        slot, row, column = self.codes.stride()
        return slot, row, column

    @property
    def scale_stride(self) -> int:
        return 0 if self.scales is None else self.scales.stride(0)


def device_weight(weight: Tensor | QuantizedWeight, device: torch.device, what: str = "the weight") -> DeviceWeight:
    """Return `weight` [S, N, K] on `device`.

    A plain weight in bf16, fp16 or fp32 stays as it is, with its strides, and without a copy if it is there.
    ValueError: another shape or dtype, a format without a kernel, NaN among fp8 codes, or scales of mxfp4 that are
    not powers of two from 2**-126 up; `what` names the weight.
    """
    if len(weight.shape) != 3:
        raise ValueError(f"{what} is {list(weight.shape)}; it must be [experts, rows, columns]")
    if isinstance(weight, Tensor):
        return _plain(weight.detach(), device, what)
    check_layout(weight.format, what)
    layout = weight.format.layout
    codes = to_chunks(weight.codes).contiguous() if layout in HALVED else weight.codes.contiguous()
    if layout == "fp8" and ((codes & 0x7F) == 0x7F).any():
        raise ValueError(f"{what} has NaN among its fp8 codes")
    scales = _exponents(weight.scales, what) if layout == "mxfp4" else _shortest(weight.scales)
    zeros = None if weight.zeros is None else weight.zeros.mT.contiguous().to(device)
    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    return DeviceWeight(weight.format, shape, codes.to(device), scales.mT.contiguous().to(device), zeros)


def empty_weight(
    weight_format: WeightFormat, shape: tuple[int, int, int], scale_dtype: torch.dtype | None, device: torch.device
) -> DeviceWeight:
    """Return memory for a weight [S, N, K] on `device`.

    scale_dtype: uint8 for mxfp4, None for formats without scales. ValueError: the format has no kernel.
    """
    check_layout(weight_format, "the weight")
    (slots, rows, columns), storage = shape, weight_format.storage

    def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(slots, *sizes, dtype=dtype, device=device)

    if storage is not None:
        return DeviceWeight(weight_format, shape, empty(rows, columns, dtype=storage))
    assert weight_format.codec is not None and scale_dtype is not None
    group = weight_format.group_size or columns
    if weight_format.layout in HALVED:
        codes = empty(-(-columns // CHUNK), rows, CHUNK // 2, dtype=torch.uint8)
    else:
        codes = empty(rows, columns, dtype=weight_format.codec.code_dtype)
    scales = empty(-(-columns // group), rows, dtype=scale_dtype)
    zeros = empty(*scales.shape[1:], dtype=torch.uint8) if weight_format.has_zero_points else None
    return DeviceWeight(weight_format, shape, codes, scales, zeros)


def check_layout(weight_format: WeightFormat, what: str) -> None:
    """ValueError: a format has no kernel; `what` names the weight."""
    if weight_format.layout not in LAYOUTS:
        others = ", ".join(name for name, f in FORMATS.items() if f.layout in LAYOUTS)
        raise ValueError(f"{what} is of format {weight_format.name}, which has no GPU kernel; these have: {others}")


def to_chunks(codes: Tensor) -> Tensor:
    """Return bytes [..., C, N, 32] of nibbles [..., N, K], one a byte; the last chunk ends with zeros."""
    padded = F.pad(codes, (0, -codes.shape[-1] % CHUNK))
    low, high = torch.unflatten(padded, -1, (-1, 2, CHUNK // 2)).movedim(-3, -4).unbind(-2)
    return low.bitwise_or(high << 4)


def from_chunks(chunks: Tensor, columns: int) -> Tensor:
    """Return nibbles [..., N, K], one a byte, of bytes [..., C, N, 32]."""
    halves = torch.stack((chunks & 0xF, chunks >> 4), -2)
    return halves.movedim(-4, -3).flatten(-3)[..., :columns]


def _plain(weight: Tensor, device: torch.device, what: str) -> DeviceWeight:
    by_dtype = {f.storage: f for f in FORMATS.values() if f.storage is not None}
    if weight.dtype not in by_dtype:
        allowed = ", ".join(str(d) for d in by_dtype)
        raise ValueError(f"{what} has dtype {weight.dtype}; it must be one of {allowed}")
    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    return DeviceWeight(by_dtype[weight.dtype], shape, weight.to(device))


def _shortest(scales: Tensor) -> Tensor:
    """Return scales in the shortest dtype that is exact."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales


def _exponents(scales: Tensor, what: str) -> Tensor:
    """Return the biased exponents of powers of two, of normal fp32 numbers."""
    bits = scales.view(torch.int32)
    if ((bits & 0x7FFFFF) != 0).any() or (bits <= 0).any():
        raise ValueError(f"{what} has scales that are no powers of two from 2**-126 up")
    return (bits >> 23).to(torch.uint8)
