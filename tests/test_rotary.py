"""Rotary embedding and sums before norms: the operators, and the passes that find them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.compare import assert_exact
from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as whole_rotary

from ktcompile.graph import report
from ktcompile.graph.report import compile_reports
from ktcompile.ops import add_rms_norm, rms_norm, rotary

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return torch.cat((rotated * cos[:, None] + turned * sin[:, None], rest), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 1, 128, 128), (2, 3, 5, 18, 18), (3, 2, 7, 20, 10), (2, 5, 90, 66, 2)])
def test_bits_are_those_of_the_formula(dtype: torch.dtype, shape: tuple[int, ...], threads: Any) -> None:
    b, h, s, d, r = shape
    x = random(b, s, h, d, dtype=dtype).transpose(1, 2)
    cos, sin, weight = (random(*n, dtype=dtype, seed=i) for i, n in enumerate(((b, s, r), (b, s, r), (d,)), 1))
    normed = rms_norm(x, weight, 1e-6, round_first=True)
    for count in (1, 2):
        threads(count)
        for given in (x, x.contiguous(), random(b, h, s, 2 * d, dtype=dtype)[..., ::2]):
            assert_exact(rotary(given, cos, sin), formula(given, cos, sin))
        assert_exact(rotary(x, cos[:1], sin[:1]), formula(x, cos[:1], sin[:1]))
        got = rotary(x, cos, sin, norm_weight=weight, epsilon=1e-6, round_first=True)
        assert_exact(got, formula(normed, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_and_its_norm_are_those_of_two_operations(dtype: torch.dtype) -> None:
    x, y, weight = random(3, 5, 70, dtype=dtype), random(5, 3, 70, dtype=dtype, seed=1).transpose(0, 1), random(70)
    total, normed = add_rms_norm(x, y, weight, 1e-6, offset=1.0)
    assert_exact(total, x + y)
    assert_exact(normed, rms_norm(x + y, weight, 1e-6, offset=1.0))


def test_what_cannot_be_is_refused() -> None:
    x, angles = random(1, 2, 3, 8), random(1, 3, 8)
    for cos, message in (
        (random(1, 4, 8), r"both must be \[1 or 1, 3, rotated\]"),
        (random(1, 3, 10), "an even number, at most the head size 8"),
        (random(1, 3, 7), "an even number"),
        (angles.double(), "cos is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            rotary(x, cos, cos)
    with pytest.raises(ValueError, match=r"x is \[2, 8\]"):
        rotary(random(2, 8), angles, angles)
    with pytest.raises(ValueError, match=r"addend is \[8\]"):
        add_rms_norm(random(2, 8), random(8), random(8), 1e-6)


class Heads(nn.Module):
    """Two kinds of heads, as attention has them."""

    def __init__(self, rotate: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self._rotate = rotate

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return self._rotate(self.norm(q).transpose(1, 2), k.transpose(1, 2), cos, sin)


@pytest.mark.parametrize("inner", ["program", "eager", "inductor"])
@pytest.mark.parametrize(("rotate", "rotated"), [(whole_rotary, 16), (partial_rotary, 6)])
def test_rotations_of_transformers_are_found(rotate: Any, rotated: int, inner: str) -> None:
    torch._dynamo.reset()
    report.clear_compile_reports()
    module = Heads(rotate)
    given = (
        random(2, 5, 4, 16),
        random(2, 5, 2, 16, seed=1),
        random(2, 5, rotated, seed=2),
        random(2, 5, rotated, seed=3),
    )
    compiled = torch.compile(module, backend="kt", fullgraph=True, options={"inner": inner})
    with torch.no_grad():
        for got, wanted in zip(compiled(*given), module(*given), strict=True):
            torch.testing.assert_close(got, wanted)
    (only,) = compile_reports()
    assert {p.name: p.matches for p in only.passes}["fuse_rotary"] == 2


def almost(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., :8], x[..., 8:]
    return x * cos + torch.cat((second, -first), -1) * sin


def test_other_rotations_are_left_alone() -> None:
    torch._dynamo.reset()
    report.clear_compile_reports()
    given = random(1, 2, 5, 16), random(1, 1, 5, 16, seed=1), random(1, 1, 5, 16, seed=2)
    compiled = torch.compile(almost, backend="kt", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), almost(*given))
    assert {p.name: p.matches for p in compile_reports()[0].passes}["fuse_rotary"] == 0
