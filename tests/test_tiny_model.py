"""The model that ships with the package: real text, real routing, and a perplexity that the backend keeps."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ktcompile
from ktcompile.models import tiny_model

WINDOW = 512


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """The evaluation text in windows, [N, 512]."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path())
    ids = tokenizer((tiny_model.path() / "eval.txt").read_text(), return_tensors="pt").input_ids[0]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def load(dtype: torch.dtype, implementation: str = "grouped_mm") -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path(), dtype=dtype, experts_implementation=implementation)
    return model.eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = []
    for ids in windows:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backend_keeps_the_perplexity(dtype: torch.dtype, windows: torch.Tensor) -> None:
    model = load(dtype)
    stock = perplexity(model, windows)
    torch._dynamo.reset()
    ours = perplexity(torch.compile(model, backend="kt", options={"inner": "eager"}), windows)
    report = ktcompile.compile_reports()[-1]
    assert report.moe_fused == report.moe_found == model.config.num_hidden_layers
    assert ours == pytest.approx(stock, rel=1e-3)
    assert stock < 25  # the text is one that it has learnt to predict


def test_routing_differs_from_layer_to_layer(windows: torch.Tensor) -> None:
    model = load(torch.float32)
    with torch.no_grad():
        router_logits = model(windows[0][None], use_cache=False, output_router_logits=True).router_logits
    favourites = {
        tuple(
            logits.topk(model.config.num_experts_per_tok)
            .indices.flatten()
            .bincount(minlength=16)
            .topk(4)
            .indices.tolist()
        )
        for logits in router_logits
    }
    assert len(favourites) == model.config.num_hidden_layers
