"""The attention implementation "kt" in transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.attention_models import CONFIGS, build, padded_prompts
from helpers.compare import relative_error
from transformers import DynamicCache

import ktcompile
from ktcompile.graph.report import clear_compile_reports

MOST = 12  # new tokens


def tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor, **settings: Any) -> list[list[int]]:
    result: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=MOST, min_new_tokens=MOST, do_sample=False, **settings
    )
    return result[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("cache", [None, "static"], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_tokens_are_those_of_eager_attention(kind: str, cache: str | None) -> None:
    ids, mask = padded_prompts()
    wanted = tokens(build(kind, "eager"), ids, mask)
    assert len({t for row in wanted for t in row}) > 2
    assert tokens(build(kind, "kt"), ids, mask, cache_implementation=cache) == wanted


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_kernels_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = padded_prompts()
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        build(kind, "kt")(ids, attention_mask=mask)
    assert names.count("kt.attention.default") == 2
    assert not any("scaled_dot_product" in name for name in names)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_compiled_model_is_one_graph(kind: str) -> None:
    ids, mask = padded_prompts()
    torch._dynamo.reset()
    clear_compile_reports()
    model = build(kind, "kt")
    with torch.no_grad():
        wanted = build(kind, "eager")(ids, attention_mask=mask).logits
        compiled = torch.compile(model, backend="kt", fullgraph=True, options={"inner": "program"})
        got = compiled(ids, attention_mask=mask).logits
    assert len(ktcompile.compile_reports()) == 1
    assert relative_error(got[:, 4:], wanted[:, 4:]) < 1e-5


def graphs_of_decode(attention: str) -> int:
    """Return how many graphs are compiled for one prompt and steps with a cache that grows."""
    ids = padded_prompts()[0]
    torch._dynamo.reset()
    clear_compile_reports()
    model = build("plain", attention)
    compiled = torch.compile(model, backend="kt", fullgraph=True, dynamic=True, options={"inner": "program"})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(ids, past_key_values=cache)
        for _ in range(3):
            compiled(ids[:, :1], past_key_values=cache)
    return len(ktcompile.compile_reports())


@pytest.mark.slow
def test_a_growing_cache_asks_for_no_more_graphs_than_with_sdpa() -> None:
    assert graphs_of_decode("kt") <= graphs_of_decode("sdpa")


def test_gradients_come_from_sdpa() -> None:
    ids, mask = padded_prompts()
    model, stock = build("window", "kt"), build("window", "sdpa")
    for m in (model, stock):
        m(ids, attention_mask=mask, labels=ids).loss.backward()
    got, wanted = (m.model.layers[0].self_attn.q_proj.weight.grad for m in (model, stock))
    assert torch.equal(got, wanted) and wanted.abs().max() > 0


def test_what_sdpa_cannot_run_either_is_refused() -> None:
    ids, mask = padded_prompts()
    with pytest.raises(ValueError, match=r'use "eager"'):
        build("softcap", "kt")(ids, attention_mask=mask)


def test_bfloat16() -> None:
    ids, mask = padded_prompts()
    with torch.no_grad():
        got, wanted = (build("groups", a, torch.bfloat16)(ids, attention_mask=mask).logits for a in ("kt", "sdpa"))
    assert got.dtype == torch.bfloat16
    assert relative_error(got[0], wanted[0]) < 0.1
