"""The weight formats, one record each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile import _native
from ktcompile.quant.codecs import LARGEST, Codec, Fp8, Int4, Int4Zero, Int8, Mxfp4

# Elements that are quantised at once: what the passes over a slice work on then stays in a core's cache.
_SLICE = 1 << 17


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One way to store weights.

    layout: the family, which decides what the kernels read. bytes_per_weight: in packed memory, with scales.
    error_budget: relative Frobenius error against fp32 that the output of an MoE layer of Gaussian weights may have.
    group_size: columns that share a scale, 0 is all of them, None is without scales.
    storage: torch dtype whose rounding defines the values of a format without scales; else None.
    codec: what defines a format with scales; else None.
    dynamic: the rows that weights are multiplied with are quantised too (`ktcompile.quant.quantize_rows`), in groups of
    the same size.
    """

    name: str
    layout: str
    bytes_per_weight: float
    error_budget: float
    group_size: int | None = None
    storage: torch.dtype | None = None
    codec: Codec | None = None
    dynamic: bool = False

    @property
    def has_zero_points(self) -> bool:
        return isinstance(self.codec, Int4Zero)

    def round_trip(self, weight: Tensor) -> Tensor:
        """Return `weight` in fp32 as it is after storing: the definition of the format, in plain torch."""
        if self.storage is not None:
            return weight.to(self.storage).float()
        return self.quantize(weight).dequantize()

    def quantize(self, weight: Tensor, what: str = "the weight") -> QuantizedWeight:
        """Return `weight` [..., N, K] as codes and scales.

        weight: K are the input features; fp32, bf16 or fp16. ValueError: it has NaN or infinite values, or some
        above 2**120, or the format has no codes; `what` names the tensor.
        """
        if self.codec is None or self.group_size is None:
            raise ValueError(f"{self.name} stores {what} itself; only formats with scales quantise")
        if weight.dim() < 2 or weight.dtype not in _BY_DTYPE:
            allowed = ", ".join(str(d) for d in _BY_DTYPE)
            raise ValueError(f"{what} is {list(weight.shape)} of {weight.dtype}; it must be [..., N, K] of {allowed}")
        weight = weight.detach()
        shape = (*weight.shape[:-1], _ceil_div(weight.shape[-1], self.group_size or weight.shape[-1]))
        codes = torch.empty(weight.shape, dtype=self.codec.code_dtype)
        scales = torch.empty(shape)
        zeros = torch.empty(shape, dtype=torch.uint8) if self.has_zero_points else None
        for at in _slices(weight, self.codec.block_rows):
            part = _matrices(weight)[at].float()
            _check_finite(part, at, what)
            _matrices(codes)[at], _matrices(scales)[at], part_zeros = self.codec.encode(part)
            if zeros is not None:
                assert part_zeros is not None
                _matrices(zeros)[at] = part_zeros
        return QuantizedWeight(self, codes, scales, zeros)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [..., N, K] as codes and scales.

    codes: one byte each, [..., N, K]: int8 of [-127, 127], uint8 of [0, 15] for four bits, bits of e4m3 for fp8.
    scales: fp32 [..., N, G], for each row also where rows share them; the last group may be shorter.
    zeros: uint8 [..., N, G] of [0, 15], or None where the format has no zero points.
    """

    format: WeightFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        codec, columns = self.format.codec, self.codes.shape[-1]
        assert codec is not None and self.codes.dtype == codec.code_dtype
        groups = _ceil_div(columns, self.format.group_size or columns)
        assert self.scales.dtype == torch.float32 and self.scales.shape == (*self.codes.shape[:-1], groups)
        assert (self.zeros is None) != self.format.has_zero_points
        assert self.zeros is None or (self.zeros.dtype == torch.uint8 and self.zeros.shape == self.scales.shape)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """Return the weight in fp32, [..., N, K]."""
        codec, columns = self.format.codec, self.codes.shape[-1]
        assert codec is not None
        group = self.format.group_size or columns

        def for_columns(per_group: Tensor) -> Tensor:
            return per_group.repeat_interleave(group, 1)[:, :columns]

        weight = torch.empty(self.codes.shape)
        for at in _slices(self.codes, 1):
            zeros = None if self.zeros is None else for_columns(_matrices(self.zeros)[at])
            values = codec.decode(_matrices(self.codes)[at], zeros)
            _matrices(weight)[at] = values * for_columns(_matrices(self.scales)[at])
        return weight


FORMATS = {
    f.name: f
    for f in (
        WeightFormat("fp32", "f32", 4, 1e-6, storage=torch.float32),
        WeightFormat("fp16", "f16", 2, 0.0006, storage=torch.float16),
        WeightFormat("bf16", "bf16", 2, 0.005, storage=torch.bfloat16),
        WeightFormat("int8", "int8", 1, 0.018, 0, codec=Int8()),
        WeightFormat("int8_dyn", "int8_dyn", 1, 0.028, 0, codec=Int8(), dynamic=True),
        WeightFormat("int4_g32", "int4", 0.5 + 2 / 32, 0.15, 32, codec=Int4(32)),
        WeightFormat("int4_g64", "int4", 0.5 + 2 / 64, 0.17, 64, codec=Int4(64)),
        WeightFormat("int4_g128", "int4", 0.5 + 2 / 128, 0.185, 128, codec=Int4(128)),
        WeightFormat("int4_g32_dyn", "int4_dyn", 0.5 + 2 / 32, 0.15, 32, codec=Int4(32), dynamic=True),
        WeightFormat("int4_g64_dyn", "int4_dyn", 0.5 + 2 / 64, 0.17, 64, codec=Int4(64), dynamic=True),
        WeightFormat("int4_g128_dyn", "int4_dyn", 0.5 + 2 / 128, 0.185, 128, codec=Int4(128), dynamic=True),
        WeightFormat("int4_g32_zp", "int4", 0.5 + 3 / 32, 0.145, 32, codec=Int4Zero(32)),
        WeightFormat("int4_g64_zp", "int4", 0.5 + 3 / 64, 0.165, 64, codec=Int4Zero(64)),
        WeightFormat("int4_g128_zp", "int4", 0.5 + 3 / 128, 0.18, 128, codec=Int4Zero(128)),
        WeightFormat("fp8", "fp8", 1 + 4 / 128, 0.055, 128, codec=Fp8(128, 128)),
        WeightFormat("fp8_channel", "fp8", 1, 0.05, 0, codec=Fp8(0, 1)),
        WeightFormat("mxfp4", "mxfp4", 0.5 + 1 / 32, 0.21, 32, codec=Mxfp4()),
    )
}

ALIASES = {"int4": "int4_g32", "int4_dyn": "int4_g32_dyn"}

_BY_DTYPE = {f.storage: f for f in FORMATS.values() if f.storage is not None}
_NATIVE = {torch.float32: _native.DType.f32, torch.float16: _native.DType.f16, torch.bfloat16: _native.DType.bf16}
FLOAT_DTYPES = tuple(_NATIVE)  # of tensors that kernels read


def native_dtype(dtype: torch.dtype, what: str) -> _native.DType:
    """Return the native name of `dtype`. ValueError: the kernels do not read it; `what` names the tensor."""
    if dtype not in _NATIVE:
        allowed = ", ".join(str(d) for d in _NATIVE)
        raise ValueError(f"{what} has dtype {dtype}; it must be one of {allowed}")
    return _NATIVE[dtype]


def full_name(name: str) -> str:
    """Return the name of the format that `name` stands for, if it is an alias."""
    return ALIASES.get(name, name)


def check_format(name: str, option: str = "weight_format") -> str:
    """Return `name`, of `option`. ValueError: it is neither "auto" nor the name of a format."""
    if name != "auto" and full_name(name) not in FORMATS:
        raise ValueError(f"{option} is {name!r}; it must be one of {', '.join(('auto', *ALIASES, *FORMATS))}")
    return name


def resolve_format(name: str, source: torch.dtype) -> WeightFormat:
    """Return the format called `name`; "auto" is the one of the source's dtype. ValueError: there is none."""
    if check_format(name) == "auto":
        native_dtype(source, "the weight")
        return _BY_DTYPE[source]
    return FORMATS[full_name(name)]


def _matrices(tensor: Tensor) -> Tensor:
    """Return a view [M, N, K] of a tensor [..., N, K]."""
    return tensor.view(-1, *tensor.shape[-2:]) if tensor.dim() != 3 else tensor


def _slices(tensor: Tensor, block_rows: int) -> Iterator[tuple[int, slice]]:
    """Yield indices of slices of rows of each matrix of a tensor [..., N, K]; they begin at multiples of block_rows."""
    rows, columns = tensor.shape[-2:]
    if tensor.numel():
        step = _ceil_div(max(1, _SLICE // columns), block_rows) * block_rows
        for matrix, begin in itertools.product(range(tensor.numel() // (rows * columns)), range(0, rows, step)):
            yield matrix, slice(begin, begin + step)


def _check_finite(part: Tensor, at: tuple[int, slice], what: str) -> None:
    bad = ~(part.abs() <= LARGEST)  # a NaN compares as false
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        where = f"matrix {at[0]}, row {at[1].start + row}, column {column}"
        raise ValueError(f"{what} has {float(part[row, column])} at {where}; it must be finite and at most 2**120")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b) if b else 0
