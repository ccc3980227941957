"""The namespace "kt" of torch.library."""

from __future__ import annotations

from typing import Any

import torch

LIBRARY: Any = torch.library.Library("kt", "DEF")  # type: ignore[no-untyped-call]


# torch has the tag from 2.9 on; before, Inductor makes no graphs of a part of what it compiles.
_UNSAFE = [tag for name, tag in torch.Tag.__members__.items() if name == "cudagraph_unsafe"]
# Of operators that send tensors to the CPU and wait for it: a CUDA graph ends before them.
BETWEEN_CUDA_GRAPHS = (torch.Tag.pt2_compliant_tag, *_UNSAFE)


def register_without_backward(name: str) -> None:
    """Let the operator `kt::name` say, where a gradient is asked for, that it has none."""
    torch.library.register_autograd(f"kt::{name}", _no_backward, lib=LIBRARY)


def _no_backward(ctx: object, grad: torch.Tensor) -> None:
    raise NotImplementedError(
        "the fused kernels have no backward yet; run under torch.no_grad(), or train the stock model"
    )
