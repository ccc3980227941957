"""Where checks of Triton kernels run: on a GPU, or in the interpreter on the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory in which every read before a write gives NaN."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def in_poison(x: Tensor, before: int = 3, after: int = 70) -> Tensor:
    """Return `x` on the device, as a view of memory that is NaN before, between and after its rows."""
    memory = poisoned(*x.shape[:-1], before + x.shape[-1] + after, dtype=x.dtype)
    view = memory[..., before : before + x.shape[-1]]
    return view.copy_(x)
