"""Comparisons of shapes that may have symbols in them, without a guard on what they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def same_sizes(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Return whether two shapes are known to be equal."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a second, for sympy

    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))
