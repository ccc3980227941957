"""Quantisation of activations, for the formats that compute in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcompile.quant.codecs import SMALLEST


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the shape of `x` and fp32 scales [..., 1]: the definition for the kernels.

    x: [..., K], finite; what shares a scale, so [..., G, S] for groups. With m the largest magnitude of a row, its
    scale is m / 127 and its codes are x * (127 / m) rounded to the nearest integer, halves to even, every operation in
    fp32. A row whose m is below 2**-100 has the scale 0 and the codes 0.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    is_zero = largest < SMALLEST
    factors = (127 / largest).masked_fill_(is_zero, 0)
    return (x * factors).round_().to(torch.int8), (largest / 127).masked_fill_(is_zero, 0)
