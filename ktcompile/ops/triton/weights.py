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
LAYOUTS = ("f32", "f16", "bf16", "fp8", "int4", "mxfp4")


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeight:
    """A weight [S, N, K] in device memory.

    codes: the weight itself, of any strides, for formats without scales; uint8 [S, N, K] for fp8; uint8
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
    layout = weight.format.layout
    if layout not in LAYOUTS:
        raise ValueError(f"{what} is of format {weight.format.name}, which has no GPU kernel")
    codes = _chunks(weight.codes) if layout in ("int4", "mxfp4") else weight.codes.contiguous()
    if layout == "fp8" and ((codes & 0x7F) == 0x7F).any():
        raise ValueError(f"{what} has NaN among its fp8 codes")
    scales = _exponents(weight.scales, what) if layout == "mxfp4" else _shortest(weight.scales)
    zeros = None if weight.zeros is None else weight.zeros.mT.contiguous().to(device)
    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    return DeviceWeight(weight.format, shape, codes.to(device), scales.mT.contiguous().to(device), zeros)


def _plain(weight: Tensor, device: torch.device, what: str) -> DeviceWeight:
    by_dtype = {f.storage: f for f in FORMATS.values() if f.storage is not None}
    if weight.dtype not in by_dtype:
        allowed = ", ".join(str(d) for d in by_dtype)
        raise ValueError(f"{what} has dtype {weight.dtype}; it must be one of {allowed}")
    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    return DeviceWeight(by_dtype[weight.dtype], shape, weight.to(device))


def _chunks(codes_SNK: Tensor) -> Tensor:
    """Return bytes [S, C, N, 32] of nibbles [S, N, K]."""
    padded = F.pad(codes_SNK, (0, -codes_SNK.shape[-1] % CHUNK))
    chunks = padded.view(*padded.shape[:2], padded.shape[2] // CHUNK, 2, CHUNK // 2)
    low, high = chunks.movedim(2, 1).unbind(3)
    return low.bitwise_or(high << 4).contiguous()


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
