"""Whether a graph needs gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def needs_gradients(example_inputs: Sequence[object]) -> bool:
    """Return whether gradients are enabled and an input asks for one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
