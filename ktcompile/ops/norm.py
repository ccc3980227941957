"""Root-mean-square normalisation: the operator `kt::rms_norm`."""

from __future__ import annotations

import torch

from ktcompile.machine import machine
from ktcompile.ops.library import LIBRARY, register_without_backward
from ktcompile.ops.threads import native_threads
from ktcompile.quant import native_dtype

LIBRARY.define(
    "rms_norm(Tensor x, Tensor weight, float epsilon, float offset=0., bool round_first=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, offset: float = 0.0, round_first: bool = False
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * (weight + offset), over the last dimension, in the dtype of `x`.

    x: [..., H], fp32, fp16 or bf16. weight: [H], of any of these. All is computed in fp32; round_first: the normalised
    row is rounded to the dtype of `x` before it is multiplied. Each row depends on that row alone, bit for bit.
    ValueError: a shape or dtype cannot be used.
    """
    result: torch.Tensor = torch.ops.kt.rms_norm(x, weight, epsilon, offset, round_first)
    return result


@torch.library.impl(LIBRARY, "rms_norm", "CPU")
def _rms_norm_cpu(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0, round_first: bool = False
) -> torch.Tensor:
    if x.dim() == 0 or weight.shape != x.shape[-1:] or not len(weight):
        raise ValueError(f"x is {list(x.shape)} and weight {list(weight.shape)}; weight must be x's last dimension")
    types = native_dtype(x.dtype, "x"), native_dtype(weight.dtype, "weight")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; it must be on {x.device}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    x_GRH = _in_groups(x)
    groups, rows, size = x_GRH.shape
    native_threads().context().norm(
        machine().isa,
        (groups, rows, size),
        types[0],
        (x_GRH.data_ptr(), x_GRH.stride(0), x_GRH.stride(1)),
        (out.data_ptr(), rows * size, size),
        weight.contiguous().data_ptr(),
        types[1],
        offset,
        epsilon,
        round_first,
    )
    return out


def _in_groups(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as [groups, rows, H], copied only where its strides are not those of such a tensor."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    # `flatten` copies where leading dimensions do not lie behind one another.
    return x.flatten(0, -3) if x.dim() > 3 else x.view(*(1,) * (3 - x.dim()), *x.shape)


@torch.library.register_fake("kt::rms_norm", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, *settings: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_without_backward("rms_norm")
