"""Weights as the native packing takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ktcompile import _native
from ktcompile.quant import QuantizedWeight, WeightFormat, full_name, resolve_format


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeight:
    """A plain weight of experts that is read while they are packed, each by itself, so that it is never whole in
    memory.

    shape: [E, out, in]. dtype: of what is read. read: returns the weight of one expert, [out, in], which the next read
    of the same thread may overwrite.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class MappedLayer:
    """A packed layer in memory of another, as a file that is mapped.

    shape: (num_experts, hidden_size, intermediate_size), or of a linear layer (heads, out_features, in_features).
    places: (address, bytes) as of the `memory` of the native layer. owner: keeps the memory.
    """

    shape: tuple[int, int, int]
    format: WeightFormat
    native_format: _native.Format
    places: list[tuple[int, int]]
    owner: object


Weight = torch.Tensor | QuantizedWeight
ExpertsWeight = Weight | StoredWeight
# (codes, strides of (expert, out, in), scales, zero points or 0, strides of (expert, out, group))
Address = tuple[int, tuple[int, int, int], int, int, tuple[int, int, int]]

_SCALES = {"int8": "f32", "int8_dyn": "f32", "fp8": "f32", "mxfp4": "e8m0"}


def format_of(weight: ExpertsWeight, weight_format: str, what: str) -> WeightFormat:
    """Return the format to store a weight in. weight_format: a name, or "auto" for that of the weight.

    ValueError: there is no such format, or the weight is quantised in another one; `what` names it.
    """
    if not isinstance(weight, QuantizedWeight):
        return resolve_format(weight_format, weight.dtype)
    if full_name(weight_format) not in ("auto", weight.format.name):
        raise ValueError(
            f'weight_format is {weight_format!r}, but {what} quantised as {weight.format.name}; leave it at "auto"'
        )
    return weight.format


def native_format(weight_format: WeightFormat, *weights: QuantizedWeight) -> _native.Format:
    """Return the native description of a format, in which the scales of `weights` are exact.

    ValueError: scales of 16 bits cannot hold those of the weights.
    """
    layout = getattr(_native.Layout, weight_format.layout)
    if weight_format.codec is None:
        return _native.Format(layout, 0, _native.ScaleType.none, False)
    scale = _SCALES.get(weight_format.layout) or _half_of(weight_format, weights)
    group = weight_format.group_size or 0
    return _native.Format(layout, group, getattr(_native.ScaleType, scale), weight_format.has_zero_points)


def _half_of(weight_format: WeightFormat, weights: tuple[QuantizedWeight, ...]) -> str:
    """Return the 16-bit type that holds all scales; what quantises here makes them bf16."""
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        if all(bool((w.scales.to(dtype) == w.scales).all()) for w in weights):
            return name
    raise ValueError(f"scales of {weight_format.name} must be exact in bf16, or in fp16, for both weights of a layer")


def quantized_address(weight: QuantizedWeight) -> Address:
    """Return where a quantised weight lies, [E, N, K] or [N, K]."""
    scales, zeros = weight.scales, weight.zeros
    assert zeros is None or zeros.stride() == scales.stride()
    places = (weight.codes.data_ptr(), _strides(weight.codes), scales.data_ptr())
    return (*places, 0 if zeros is None else zeros.data_ptr(), _strides(scales))


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    strides = tensor.stride()
    return (0 if tensor.dim() == 2 else strides[-3], strides[-2], strides[-1])
