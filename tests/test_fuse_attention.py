"""The pass that replaces `scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.attention_models import build, padded_prompts
from helpers.compare import relative_error
from torch import Tensor, fx

import ktcompile
from ktcompile.graph.report import CompileReport, clear_compile_reports
from ktcompile.ops import attention


def compiled(
    function: Any, *args: Any, inner: str = "eager", dynamic: bool | None = False
) -> tuple[Any, CompileReport]:
    """Return what the compiled function gives without gradients, and the report."""
    torch._dynamo.reset()
    clear_compile_reports()
    with torch.no_grad():
        result = torch.compile(function, backend="kt", fullgraph=True, dynamic=dynamic, options={"inner": inner})(*args)
    (report,) = ktcompile.compile_reports()
    return result, report


def random_tensors(heads: int = 4, kv_heads: int = 4, queries: int = 6, positions: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads + kv_heads + queries)
    sizes = [(2, heads, queries, 16), (2, kv_heads, positions, 16), (2, kv_heads, positions, 16)]
    return [torch.randn(size, generator=generator) for size in sizes]


def repeat(x: Tensor, times: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, times, s, d).reshape(b, h * times, s, d)


CALLS: dict[str, Any] = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "boolean": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(6, 9, dtype=torch.bool).tril(2)),
    "additive": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.arange(54.0).view(6, 9).sin()),
    "views": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(2, 6, 64),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_run_on_the_kernels(call: str) -> None:
    tensors = random_tensors()
    got, report = compiled(CALLS[call], *tensors)
    assert report.attention_fused == 1 and not report.attention_fallbacks
    assert relative_error(got, CALLS[call](*tensors)) < 1e-6


def test_the_result_is_that_of_the_operator() -> None:
    tensors = random_tensors()
    got, _ = compiled(CALLS["causal"], *tensors)
    assert torch.equal(got, attention(*tensors, causal=True, first_position=0))


@pytest.mark.parametrize("how", ["enable_gqa", "repeated", "unsqueezed"])
def test_repeated_keys_are_read_as_they_were(how: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if how == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if how == "repeated":
            return F.scaled_dot_product_attention(q, repeat(k, 3), repeat(v, 3))
        k, v = (x.unsqueeze(2).expand(2, 2, 3, 9, 16).reshape(2, 6, 9, 16) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    tensors = random_tensors(6, 2)
    got, report = compiled(call, *tensors)
    assert report.attention_fused == 1
    assert relative_error(got, call(*tensors)) < 1e-6
    assert torch.equal(got, attention(*tensors))


def test_the_source_of_a_repetition_is_in_the_graph() -> None:
    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        from ktcompile.passes.fuse_attention import fuse_attention

        from ktcompile.config import CompileOptions

        assert fuse_attention(CompileOptions())(gm, example_inputs, CompileReport(inner="eager")) == 1
        graphs.append(gm.graph)
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    tensors = random_tensors(6, 2)
    with torch.no_grad():
        torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k, 3), repeat(v, 3)), backend=keep)(
            *tensors
        )
    (graph,) = graphs
    (node,) = [n for n in graph.nodes if str(n.target) == "kt.attention.default"]
    assert all(n.op == "placeholder" for n in node.args[:3])
    assert not any(n.target == "expand" for n in graph.nodes)


LEFT: dict[str, tuple[Any, str]] = {
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), "dropout_p is 0.5"),
    "three dimensions": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), "not all of"),
    "double": (
        lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
        "torch.float64",
    ),
    "broadcast": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), "number of sequences"),
}


@pytest.mark.parametrize("call", LEFT)
def test_what_is_not_known_is_left_with_a_reason(call: str) -> None:
    function, reason = LEFT[call]
    tensors = random_tensors()
    got, report = compiled(function, *tensors)
    assert report.attention_fused == 0 and len(report.attention_fallbacks) == 1
    assert reason in report.attention_fallbacks[0]
    assert report.moe_found == 0
    if call != "dropout":
        assert torch.equal(got, function(*tensors))


def test_gradients_leave_it_alone() -> None:
    tensors = [t.requires_grad_() for t in random_tensors()]
    torch._dynamo.reset()
    clear_compile_reports()
    result = torch.compile(CALLS["plain"], backend="kt", options={"inner": "eager"})(*tensors)
    result.sum().backward()
    (report,) = ktcompile.compile_reports()
    assert "gradients" in report.attention_fallbacks[0] and tensors[0].grad is not None


def test_it_can_be_disabled() -> None:
    tensors = random_tensors()
    torch._dynamo.reset()
    clear_compile_reports()
    options = {"inner": "eager", "disable_passes": ["fuse_attention"]}
    with torch.no_grad():
        got = torch.compile(CALLS["plain"], backend="kt", options=options)(*tensors)
    (report,) = ktcompile.compile_reports()
    assert report.attention_fused == 0 and torch.equal(got, CALLS["plain"](*tensors))


@pytest.mark.parametrize("kind", ["plain", "groups", "latents"])
def test_unmodified_models(kind: str) -> None:
    ids, mask = padded_prompts()
    model = build(kind, "sdpa")
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
    got, report = compiled(lambda i, m: model(i, attention_mask=m).logits, ids, mask, dynamic=kind == "plain")
    assert report.attention_fused == 2
    assert relative_error(got[:, 4:], wanted[:, 4:]) < 1e-5


@pytest.mark.slow
def test_inductor_takes_the_rest() -> None:
    tensors = random_tensors()
    got, report = compiled(CALLS["views"], *tensors, inner="inductor")
    assert report.attention_fused == 1
    assert relative_error(got, CALLS["views"](*tensors)) < 1e-6
