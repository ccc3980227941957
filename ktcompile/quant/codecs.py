"""How each family of formats turns weights into codes and scales, and codes into values: its definition.

A codec works on a slice of rows of one matrix in fp32, so that memory beside the weights stays bounded. What it
returns is a fixed point: values that came from codes give the same values again.

Shape suffixes: N rows (output features), K columns (input features), G groups of columns, S columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# A group whose magnitudes are all below becomes zeros: scales then never are subnormal, whatever they are divided by.
SMALLEST = 2.0**-100
# Above, the product of a code and a rounded scale could overflow.
LARGEST = 2.0**120

# Scales that are tried for int4, as the code (not rounded) on which the largest magnitude of a group falls, and with
# zero points as the codes that the span of a group takes. Beyond the codes that there are, the largest values are
# clipped in favour of all others. With 8 and 7, or 15 and 14, a group that is representable is found again.
_INT4_EXTREMES = (8.0, 7.0, 7.35, 7.7, 8.3, 8.6, 9.0, 9.4, 9.8)
_INT4_SPANS = (15.0, 14.5, 15.5, 16.0, 16.5, 17.0, 18.0)
_INT4_REFINEMENTS = 2

# By code, without the sign in bit 3.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Codec(Protocol):
    """block_rows: rows that share a scale; slices begin at multiples of it. code_dtype: int8 or uint8."""

    @property
    def block_rows(self) -> int: ...

    @property
    def code_dtype(self) -> torch.dtype: ...

    def encode(self, w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes [N, K], scales [N, G] in fp32, and zero points [N, G] in uint8 if the codec has them."""

    def decode(self, codes_NK: Tensor, zeros_NK: Tensor | None) -> Tensor:
        """Return in fp32 what the codes stand for before they are scaled, [N, K]."""


@dataclass(frozen=True, slots=True)
class Int8:
    """Integers in [-127, 127], one scale for each row: max / 127."""

    block_rows: int = 1
    code_dtype: torch.dtype = torch.int8

    def encode(self, w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scales_N1 = _short(_zero_if_small(w_NK.abs().amax(1, keepdim=True)) / 127)
        return (w_NK * _inverse(scales_N1)).round_().to(torch.int8), scales_N1, None

    def decode(self, codes_NK: Tensor, zeros_NK: Tensor | None) -> Tensor:
        return codes_NK.float()


@dataclass(frozen=True, slots=True)
class Int4:
    """Integers of four bits with one scale for `group` columns: `(code - 8) * scale`, where the scale may be negative.

    Scales are values of bf16. Of the candidates the one of the least squared error is taken, and then improved by
    least squares.
    """

    group: int
    block_rows: int = 1
    code_dtype: torch.dtype = torch.uint8

    def encode(self, w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        w_NGS, powers_NG1 = _normalised(w_NK, self.group)
        high, low = w_NGS.amax(2, keepdim=True), w_NGS.amin(2, keepdim=True)
        # It falls on code -8, which has no positive counterpart.
        extreme = torch.where(high > -low, high, low)
        search = _ScaleSearch(w_NGS, lambda steps: steps.clamp_(-8, 7))
        for n in _INT4_EXTREMES:
            search.attempt(extreme / -n)
        # Where the extreme does not reach code 7, the scale cannot be found again.
        search.refine(extreme.abs() / 6.52)
        codes_NGS = search.steps().add_(8).to(torch.uint8)
        return codes_NGS.flatten(1)[:, : w_NK.shape[1]], (search.scales * powers_NG1).squeeze(2), None

    def decode(self, codes_NK: Tensor, zeros_NK: Tensor | None) -> Tensor:
        return codes_NK.float().sub_(8)


@dataclass(frozen=True, slots=True)
class Int4Zero:
    """Integers of four bits with one scale and one zero point for `group` columns: `(code - zero) * scale`.

    Zero points are in [0, 15], so that 0 is always a value. Scales are as for `Int4`, and positive.
    """

    group: int
    block_rows: int = 1
    code_dtype: torch.dtype = torch.uint8

    def encode(self, w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        w_NGS, powers_NG1 = _normalised(w_NK, self.group)
        high, low = w_NGS.amax(2, keepdim=True).clamp_min_(0), w_NGS.amin(2, keepdim=True).clamp_max_(0)
        span = high - low
        # Where 0 lies in the span, so that clipping takes its share from both ends.
        zeros_NG1 = (15 * -low * _inverse(span)).round_()
        search = _ScaleSearch(w_NGS, lambda steps: steps.clamp_(-zeros_NG1, 15 - zeros_NG1))
        for n in _INT4_SPANS:
            search.attempt(span / n)
        # Where the span takes fewer than 14 steps, the scale cannot be found again; hence not rounded up either.
        search.attempt(_cut_to_bf16(span / 14))
        search.refine(span / 14.1)
        codes_NK = search.steps().add_(zeros_NG1).to(torch.uint8).flatten(1)[:, : w_NK.shape[1]]
        return codes_NK, (search.scales * powers_NG1).squeeze(2), zeros_NG1.squeeze(2).to(torch.uint8)

    def decode(self, codes_NK: Tensor, zeros_NK: Tensor | None) -> Tensor:
        assert zeros_NK is not None
        return codes_NK.float().sub_(zeros_NK)


@dataclass(frozen=True, slots=True)
class Fp8:
    """Floats of one byte, e4m3 without infinities, one scale for `block_rows` rows and `group` columns: max / 448.

    group: 0 is all columns. The format is `float8_e4m3fn` of torch; see "FP8 Formats for Deep Learning",
    arXiv:2209.05433.
    """

    group: int
    block_rows: int
    code_dtype: torch.dtype = torch.uint8

    def encode(self, w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, columns = w_NK.shape
        w_NGS = _grouped(w_NK, self.group)
        max_NG = w_NGS.abs().amax(2)
        padded_NG = F.pad(max_NG, (0, 0, 0, -rows % self.block_rows))
        blocks = padded_NG.view(-1, self.block_rows, max_NG.shape[1]).amax(1)
        scales_NG = _short(_zero_if_small(blocks) / 448).repeat_interleave(self.block_rows, 0)[:rows]
        # Rounding of the scale leaves the largest within 448 * (1 + 2**-16), which is still rounded to 448.
        scaled = (w_NGS * _inverse(scales_NG).unsqueeze(2)).flatten(1)[:, :columns]
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales_NG, None

    def decode(self, codes_NK: Tensor, zeros_NK: Tensor | None) -> Tensor:
        return codes_NK.contiguous().view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Floats of four bits, e2m1, with one power of two for 32 columns.

    See "OCP Microscaling Formats (MX) Specification", version 1.0. Of the exponent that the specification derives
    from the maximum, which clips to 6 what is above, and the next, the one of the least squared error is taken.
    """

    block_rows: int = 1
    code_dtype: torch.dtype = torch.uint8

    def encode(self, w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        w_NGS, powers_NG1 = _normalised(w_NK, 32)
        # Maxima are in [0.5, 1), and 1/8 puts them into [4, 8).
        scales = torch.full_like(powers_NG1, 0.125)
        least = torch.full_like(powers_NG1, torch.inf)
        for scale in (0.125, 0.25):
            residual = w_NGS.abs().sub_(_e2m1(w_NGS.abs().div_(scale))[0].mul_(scale))
            error = torch.linalg.vecdot(residual, residual).unsqueeze(2)
            better = error < least
            least = torch.where(better, error, least)
            scales = torch.where(better, scale, scales)
        magnitude_codes = _e2m1(w_NGS.abs().div_(scales))[1].to(torch.uint8)
        codes_NGS = magnitude_codes.add_(torch.signbit(w_NGS).to(torch.uint8).mul_(8))
        # Zero groups have the scale 1: there is no code for a scale of 0.
        scales_NG = torch.where(powers_NG1 == 0, 1.0, scales * powers_NG1).squeeze(2)
        return codes_NGS.flatten(1)[:, : w_NK.shape[1]], scales_NG, None

    def decode(self, codes_NK: Tensor, zeros_NK: Tensor | None) -> Tensor:
        values = torch.tensor(_E2M1_MAGNITUDES + tuple(-m for m in _E2M1_MAGNITUDES))
        return values[codes_NK.int()]


class _ScaleSearch:
    """The best scales so far, [N, G, 1], for groups of steps that `clip` keeps, in place, to those that there are."""

    def __init__(self, w_NGS: Tensor, clip: Callable[[Tensor], Tensor]) -> None:
        self._w, self._clip = w_NGS, clip
        self._work = torch.empty_like(w_NGS)
        self.scales = torch.zeros_like(w_NGS[:, :, :1])
        self._least = torch.full_like(self.scales, torch.inf)

    def attempt(self, scales_NG1: Tensor) -> None:
        """Take the scales, rounded to bf16, for the groups where the squared error is less."""
        scales = scales_NG1.bfloat16().float()
        # A group that is representable has an error of exactly 0: products of codes and scales are exact.
        residual = torch.addcmul(self._w, self._steps(scales), scales, value=-1, out=self._work)
        error = torch.linalg.vecdot(residual, residual).unsqueeze(2)
        better = error < self._least
        self._least = torch.where(better, error, self._least)
        self.scales = torch.where(better, scales, self.scales)

    def refine(self, limit_NG1: Tensor) -> None:
        """Attempt the least-squares scales of the best codes, of a magnitude that is at most `limit_NG1`."""
        for _ in range(_INT4_REFINEMENTS):
            steps = self.steps()
            products, squares = torch.linalg.vecdot(self._w, steps), torch.linalg.vecdot(steps, steps)
            self.attempt((products * _inverse(squares)).unsqueeze(2).clamp(-limit_NG1, limit_NG1))

    def steps(self) -> Tensor:
        """Return codes less zero points with the best scales, in memory that the next call overwrites."""
        return self._steps(self.scales)

    def _steps(self, scales_NG1: Tensor) -> Tensor:
        return self._clip(torch.mul(self._w, _inverse(scales_NG1), out=self._work).round_())


def _e2m1(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return magnitudes rounded to e2m1, ties to even, and their codes, both in fp32."""
    # Steps are 1/2 below 2, 1 below 4, 2 below 6: three ramps that saturate one after another.
    halves = (magnitudes * 2).round_().clamp_(max=4)
    ones = magnitudes.round().clamp_(2, 4).sub_(2)
    twos = (magnitudes * 0.5).round_().clamp_(2, 3).sub_(2)
    codes = halves + ones + twos
    return halves.mul_(0.5).add_(ones).add_(twos, alpha=2), codes


def _normalised(w_NK: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return groups [N, G, S] divided by powers of two such that their maxima are in [0.5, 1), and the powers
    [N, G, 1], 0 for a group that becomes zeros: squares then neither overflow nor vanish."""
    w_NGS = _grouped(w_NK, group)
    max_NG1 = _zero_if_small(torch.maximum(w_NGS.amax(2, keepdim=True), -w_NGS.amin(2, keepdim=True)))
    exponents = torch.frexp(max_NG1).exponent
    is_zero = max_NG1 == 0
    powers = torch.ldexp(torch.ones_like(max_NG1), exponents).masked_fill_(is_zero, 0)
    return w_NGS * _inverse(powers), powers


def _grouped(w_NK: Tensor, group: int) -> Tensor:
    """Return [N, G, S] with zeros after the last column. group: 0 is all columns."""
    rows, columns = w_NK.shape
    size = group or columns
    return F.pad(w_NK, (0, -columns % size)).view(rows, -1, size)


def _zero_if_small(magnitudes: Tensor) -> Tensor:
    return torch.where(magnitudes < SMALLEST, 0.0, magnitudes)


def _inverse(x: Tensor) -> Tensor:
    """Return 1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def _cut_to_bf16(x: Tensor) -> Tensor:
    """Return values of bf16 in fp32, rounded towards zero."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32)


def _short(scales: Tensor) -> Tensor:
    """Return positive scales rounded to 16 significant bits: their product with a code of 8 bits is then exact."""
    return ((scales.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)
