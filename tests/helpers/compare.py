"""How far results may be apart, by what makes them differ."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of `wanted`."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_exact(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """Fail unless both have the same bits: what must not depend on batch, threads or instruction set. NaN has the
    same bits as NaN."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"{what}: {got.shape} against {wanted.shape}"
    differs = (_bits(got) != _bits(wanted)) & ~(got.isnan() & wanted.isnan())
    assert not differs.any(), (
        f"{what}: {int(differs.sum())} elements differ, the first at {differs.nonzero()[0].tolist()}"
    )


def assert_rounding(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """Fail unless `got` is `wanted` [in a wider dtype] rounded once: at most half of the distance of two neighbours."""
    unit = torch.finfo(got.dtype)
    bound = wanted.double().abs() * unit.eps / 2 + unit.smallest_normal * unit.eps
    worst = float(((got.double() - wanted.double()).abs() - bound).max())
    assert worst <= 0, f"{what}: off by {worst:.2e} more than one rounding"


def assert_reduction(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """Fail unless `got` is `wanted` up to the order of fp32 sums and the roundings of its dtype, in the norm and in
    each element."""
    assert got.isfinite().all(), f"{what}: {int((~got.isfinite()).sum())} elements are not finite"
    unit = torch.finfo(got.dtype).eps
    norm = max(1.5e-6, unit)
    error = relative_error(got, wanted)
    assert error <= norm, f"{what}: relative error {error:.2e}, allowed {norm:.2e}"
    scale = wanted.double().square().mean().sqrt()
    worst = float((got.double() - wanted.double()).abs().max() / scale)
    assert worst <= 8 * norm, f"{what}: an element is off by {worst:.2e} of the typical size, allowed {8 * norm:.2e}"


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)
