"""The weight formats, one record each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ktcompile import _native


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One way to store weights.

    storage: torch dtype whose rounding defines the format's values. bytes_per_weight: in packed memory.
    """

    name: str
    storage: torch.dtype
    native: _native.DType
    bytes_per_weight: float

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` in fp32 as it is after storing: the definition of the format, in plain torch."""
        return weight.to(self.storage).float()


FORMATS = {
    f.name: f
    for f in (
        WeightFormat("fp32", torch.float32, _native.DType.f32, 4),
        WeightFormat("fp16", torch.float16, _native.DType.f16, 2),
        WeightFormat("bf16", torch.bfloat16, _native.DType.bf16, 2),
    )
}

_BY_DTYPE = {f.storage: f for f in FORMATS.values()}


def native_dtype(dtype: torch.dtype, what: str) -> _native.DType:
    """Return the native name of `dtype`. ValueError: the kernels do not read it; `what` names the tensor."""
    if dtype not in _BY_DTYPE:
        allowed = ", ".join(str(d) for d in _BY_DTYPE)
        raise ValueError(f"{what} has dtype {dtype}; it must be one of {allowed}")
    return _BY_DTYPE[dtype].native


def resolve_format(name: str, source: torch.dtype) -> WeightFormat:
    """Return the format called `name`; "auto" is the one of the source's dtype."""
    if name == "auto":
        native_dtype(source, "the weight")
        return _BY_DTYPE[source]
    if name not in FORMATS:
        raise ValueError(f"weight_format is {name!r}; it must be auto or one of {', '.join(FORMATS)}")
    return FORMATS[name]
