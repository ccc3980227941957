"""Root-mean-square normalisation: the operators `kt::rms_norm` and `kt::add_rms_norm`."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ktcompile import _native
from ktcompile.machine import machine
from ktcompile.ops.library import LIBRARY, register_without_backward
from ktcompile.ops.threads import native_threads
from ktcompile.quant import native_dtype

# Address, dtype, offset, epsilon, round_first.
NormPlace: TypeAlias = tuple[int, _native.DType, float, float, bool]

for _schema in (
    "rms_norm(Tensor x, Tensor weight, float epsilon, float offset=0., bool round_first=False) -> Tensor",
    "add_rms_norm(Tensor x, Tensor addend, Tensor weight, float epsilon, float offset=0., bool round_first=False)"
    " -> (Tensor, Tensor)",
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, round_first: bool = False) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * (weight + offset), over the last dimension, in the dtype of `x`.

    x: [..., H], fp32, fp16 or bf16. weight: [H], of any of these. All is computed in fp32; round_first: the normalised
    row is rounded to the dtype of `x` before it is multiplied. Each row depends on that row alone, bit for bit.
    ValueError: a shape or dtype cannot be used.
    """
    result: Tensor = torch.ops.kt.rms_norm(x, weight, epsilon, offset, round_first)
    return result


def add_rms_norm(
    x: Tensor, addend: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x + addend and its `rms_norm`: the same bits as one after the other. addend: as `x`, also its dtype."""
    result: tuple[Tensor, Tensor] = torch.ops.kt.add_rms_norm(x, addend, weight, epsilon, offset, round_first)
    return result


@torch.library.impl(LIBRARY, "rms_norm", "CPU")
def run(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0, round_first: bool = False) -> Tensor:
    """Run the native kernels. As `rms_norm`, which goes through torch's dispatcher."""
    place, weight = norm_place(x, weight, epsilon, offset, round_first)
    out = torch.empty(x.shape, dtype=x.dtype)
    if not x.numel():
        return out
    size = x.shape[-1]
    if x.is_contiguous():
        groups, rows, strides = 1, x.numel() // size, (0, size)
    else:
        x = _in_groups(x)
        groups, rows, strides = x.shape[0], x.shape[1], (x.stride(0), x.stride(1))
    native_threads().context().norm(
        machine().isa,
        (groups, rows, size),
        native_dtype(x.dtype, "x"),
        (x.data_ptr(), *strides),
        (out.data_ptr(), rows * size, size),
        place,
        (0, 0),
    )
    return out


@torch.library.impl(LIBRARY, "add_rms_norm", "CPU")
def run_add(
    x: Tensor, addend: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the native kernels. As `add_rms_norm`, which goes through torch's dispatcher."""
    if addend.shape != x.shape or addend.dtype != x.dtype or addend.device != x.device:
        given = f"addend is {list(addend.shape)} of {addend.dtype} on {addend.device}"
        raise ValueError(f"{given}; it must be {list(x.shape)} of {x.dtype} on {x.device}, as x")
    place, weight = norm_place(x, weight, epsilon, offset, round_first)
    x, addend = x.contiguous(), addend.contiguous()
    total, out = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    size = x.shape[-1]
    native_threads().context().norm(
        machine().isa,
        (1, x.numel() // size, size),
        native_dtype(x.dtype, "x"),
        (x.data_ptr(), 0, size),
        (out.data_ptr(), 0, size),
        place,
        (addend.data_ptr(), total.data_ptr()),
    )
    return total, out


def norm_place(x: Tensor, weight: Tensor, epsilon: float, offset: float, round_first: bool) -> tuple[NormPlace, Tensor]:
    """Return what kernels are told of a norm of `x`, and the weight, whose address is in it.

    ValueError: a shape or dtype cannot be used.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or not len(weight):
        raise ValueError(f"x is {list(x.shape)} and weight {list(weight.shape)}; weight must be x's last dimension")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; it must be on {x.device}")
    weight = weight.contiguous()
    return (weight.data_ptr(), native_dtype(weight.dtype, "weight"), offset, epsilon, round_first), weight


def _in_groups(x: Tensor) -> Tensor:
    """Return `x` as [groups, rows, H], copied only where its strides are not those of such a tensor."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    # `flatten` copies where leading dimensions do not lie behind one another.
    return x.flatten(0, -3) if x.dim() > 3 else x.view(*(1,) * (3 - x.dim()), *x.shape)


@torch.library.register_fake("kt::rms_norm", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _rms_norm_fake(x: Tensor, weight: Tensor, *settings: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("kt::add_rms_norm", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _add_rms_norm_fake(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))  # type: ignore[return-value]


for _name in ("rms_norm", "add_rms_norm"):
    register_without_backward(_name)
