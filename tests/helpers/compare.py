"""How far results may be apart, by what makes them differ."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of `wanted`."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
