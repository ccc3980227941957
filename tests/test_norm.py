"""Root-mean-square normalisation: the operator, and the pass that finds it in models."""

from __future__ import annotations

import pytest
import torch
from helpers.compare import assert_exact, relative_error
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from ktcompile.graph import report
from ktcompile.graph.norms import NormFacts, describe_norm, reference_norm
from ktcompile.graph.report import compile_reports
from ktcompile.ops import rms_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KNOWN = {
    Qwen3MoeRMSNorm: (0.0, True),
    GptOssRMSNorm: (0.0, False),
    Gemma2RMSNorm: (1.0, False),
    Qwen3NextRMSNorm: (1.0, False),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("round_first", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_normalised(dtype, weight_dtype, offset, round_first):
    facts = NormFacts(1e-5, offset, round_first)
    for size in (1, 7, 32, 100, 2048):
        x, weight = random(5, size, dtype=dtype), random(size, dtype=weight_dtype, seed=1)
        got = rms_norm(x, weight, facts.epsilon, offset=offset, round_first=round_first)
        assert got.dtype == dtype
        unit = torch.finfo(dtype).eps
        assert relative_error(got, reference_norm(x, weight, facts)) < max(2 * unit, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_else(dtype, threads):
    x, weight = random(700, 96, dtype=dtype), random(96, dtype=dtype, seed=1)
    whole = rms_norm(x, weight, 1e-6)
    for count in (1, 2):
        threads(count)
        assert_exact(rms_norm(x, weight, 1e-6), whole)
    for begin, end in ((0, 1), (3, 40), (640, 700)):
        assert_exact(rms_norm(x[begin:end], weight, 1e-6), whole[begin:end])


def test_strides():
    wide, weight = random(2, 3, 5, 40), random(16, seed=1)
    for x in (
        wide[..., 8:24],
        wide.transpose(1, 2)[..., :16],
        wide[:, :, 0, :16],
        wide[0, 0, :, 3:19],
        wide[0, 0, 0, :16],
    ):
        assert_exact(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))
    columns = random(16, 6).mT
    assert_exact(rms_norm(columns, weight, 1e-6), rms_norm(columns.contiguous(), weight, 1e-6))
    assert rms_norm(random(0, 16), weight, 1e-6).shape == (0, 16)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"x is \[2, 8\] and weight \[7\]"):
        rms_norm(random(2, 8), random(7), 1e-6)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float64"):
        rms_norm(random(2, 8), random(8).double(), 1e-6)


@pytest.mark.parametrize("cls", KNOWN)
def test_modules_are_recognised_by_running_them(cls):
    assert describe_norm(cls(64, eps=3e-6)) == NormFacts(3e-6, *KNOWN[cls])


def test_other_modules_are_not():
    class Twice(Qwen3MoeRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for module in (nn.LayerNorm(8), nn.Linear(8, 8), Twice(8, eps=1e-6), nn.Sequential(nn.RMSNorm(8))):
        assert describe_norm(module) is None


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    report.clear_compile_reports()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", KNOWN)
def test_the_pass(cls, fresh):
    module = nn.Sequential(cls(48, eps=1e-6), nn.SiLU(), cls(48, eps=1e-6)).to(torch.bfloat16).requires_grad_(False)
    for n in (0, 2):
        module[n].weight.copy_(random(48, seed=n))
    x = random(2, 5, 48, dtype=torch.bfloat16)
    compiled = torch.compile(module, backend="kt", fullgraph=True, options={"inner": "program"})
    assert relative_error(compiled(x), module(x)) < 1e-2
    (only,) = compile_reports()
    assert [p.matches for p in only.passes if p.name == "fuse_norm"] == [2]
    assert_exact(compiled(x)[1, 3:4], compiled(x[1:, 3:4])[0])


def test_gradients_keep_the_stock_modules(fresh):
    module = Qwen3MoeRMSNorm(48)
    torch.compile(module, backend="kt", options={"inner": "program"})(random(2, 48)).sum().backward()
    assert module.weight.grad is not None
