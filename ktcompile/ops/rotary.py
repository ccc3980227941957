"""Rotary position embedding of heads: the operator `kt::rotary`.

Shape suffixes: B sequences, S positions, H heads, D size of a head, R how many of its elements are rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktcompile import _native
from ktcompile.machine import machine
from ktcompile.ops.library import LIBRARY, register_without_backward
from ktcompile.ops.norm import NormPlace, norm_place
from ktcompile.ops.threads import native_threads
from ktcompile.quant import native_dtype

LIBRARY.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? norm_weight=None, float epsilon=0., float offset=0.,"
    " bool round_first=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_NO_NORM: NormPlace = (0, _native.DType.f32, 0.0, 0.0, False)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    offset: float = 0.0,
    round_first: bool = False,
) -> Tensor:
    """Return x * cos + rotated(x) * sin, [B, H, S, D] in the dtype of `x`; memory lies as [B, S, H, D].

    x: [B, H, S, D], fp32, fp16 or bf16. cos, sin: [B or 1, S, R] of that dtype, R even, at most D; rotated(x) is
    (-x2, x1) of the halves x1 and x2 of the first R elements, and the others stay. norm_weight: [D]; where there is
    one, heads are normalised first, as by `rms_norm` with `epsilon`, `offset` and `round_first`. Products and sums are
    rounded one by one: the bits are those of the formula in torch. ValueError: a shape or dtype cannot be used.
    """
    result: Tensor = torch.ops.kt.rotary(x, cos, sin, norm_weight, epsilon, offset, round_first)
    return result


@torch.library.impl(LIBRARY, "rotary", "CPU")
def run(
    x_BHSD: Tensor,
    cos_BSR: Tensor,
    sin_BSR: Tensor,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    offset: float = 0.0,
    round_first: bool = False,
) -> Tensor:
    """Run the native kernels. As `rotary`, which goes through torch's dispatcher."""
    rotated = _check(x_BHSD, cos_BSR, sin_BSR)
    sequences, heads, positions, size = x_BHSD.shape
    norm = _NO_NORM
    if norm_weight is not None:
        norm, norm_weight = norm_place(x_BHSD, norm_weight, epsilon, offset, round_first)
    if x_BHSD.stride(3) != 1:
        x_BHSD = x_BHSD.contiguous()
    if cos_BSR.stride() != sin_BSR.stride() or cos_BSR.stride(2) != 1:
        cos_BSR, sin_BSR = cos_BSR.contiguous(), sin_BSR.contiguous()
    out_BSHD = torch.empty(sequences, positions, heads, size, dtype=x_BHSD.dtype)
    native_threads().context().rotary(
        machine().isa,
        (sequences, positions, heads, size, rotated),
        native_dtype(x_BHSD.dtype, "x"),
        (x_BHSD.data_ptr(), x_BHSD.stride(0), x_BHSD.stride(2), x_BHSD.stride(1)),
        (out_BSHD.data_ptr(), positions * heads * size, heads * size, size),
        cos_BSR.data_ptr(),
        sin_BSR.data_ptr(),
        (cos_BSR.stride(0) if len(cos_BSR) == sequences else 0, cos_BSR.stride(1)),
        norm,
    )
    return out_BSHD.transpose(1, 2)


@torch.library.register_fake("kt::rotary", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _rotary_fake(x: Tensor, *others: object) -> Tensor:
    sequences, heads, positions, size = x.shape
    return x.new_empty(sequences, positions, heads, size).transpose(1, 2)


register_without_backward("rotary")


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> int:
    """Return how many elements of a head are rotated. ValueError: a shape or dtype cannot be used."""
    if x.dim() != 4 or x.shape[3] == 0:
        raise ValueError(f"x is {list(x.shape)}; it must be [sequences, heads, positions, head size]")
    shape = cos.shape
    if len(shape) != 3 or shape[0] not in (1, x.shape[0]) or shape[1] != x.shape[2] or sin.shape != shape:
        wanted = f"[{x.shape[0]} or 1, {x.shape[2]}, rotated]"
        raise ValueError(f"cos is {list(shape)} and sin {list(sin.shape)}; both must be {wanted}")
    if shape[2] % 2 or shape[2] > x.shape[3]:
        raise ValueError(f"cos is {list(shape)}; it must end with an even number, at most the head size {x.shape[3]}")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dtype != x.dtype or angles.device != x.device:
            given = f"{name} is {angles.dtype} on {angles.device}"
            raise ValueError(f"{given}; it must be {x.dtype} on {x.device}, as x")
    return int(shape[2])
