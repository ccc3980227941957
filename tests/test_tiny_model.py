"""The model that ships with the package: real text, real routing, and a perplexity that the backend keeps."""

from __future__ import annotations

import pytest
import torch
from helpers.perplexity import compiled, load, log_probabilities, perplexity, text_windows

import ktcompile
from ktcompile.quant import FORMATS

# How far what is predicted may be from what the stock model predicts: the mean over tokens of the Kullback-Leibler
# divergence, which is about the logarithm of what perplexity rises by; measured is half of it, alike in every window.
DIVERGENCE = {
    "fp32": 1e-6,
    "fp16": 1e-6,
    "bf16": 1e-6,
    "int8": 7e-5,
    "int8_dyn": 7e-4,
    "int4_g32": 0.007,
    "int4_g64": 0.009,
    "int4_g128": 0.01,
    "int4_g32_dyn": 0.007,
    "int4_g64_dyn": 0.009,
    "int4_g128_dyn": 0.01,
    "int4_g32_zp": 0.007,
    "int4_g64_zp": 0.009,
    "int4_g128_zp": 0.01,
    "fp8": 9e-4,
    "fp8_channel": 9e-4,
    "mxfp4": 0.015,
}


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """A third of the evaluation text in windows, [12, 512]."""
    return text_windows()[::3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backend_keeps_the_perplexity(dtype: torch.dtype, windows: torch.Tensor) -> None:
    model = load(dtype)
    stock = perplexity(model, windows)
    ours = perplexity(compiled(model), windows)
    report = ktcompile.compile_reports()[-1]
    assert report.moe_fused == report.moe_found == model.config.num_hidden_layers
    assert ours == pytest.approx(stock, rel=1e-3)
    assert stock < 25  # the text is one that it has learnt to predict


@pytest.mark.slow
@torch.no_grad()
def test_every_format_predicts_what_the_stock_model_predicts(windows: torch.Tensor) -> None:
    model, some = load(torch.float32), windows[::3]
    stock = log_probabilities(model, some)

    def divergence(weight_format: str) -> float:
        ours = log_probabilities(compiled(model, weight_format), some)
        return (stock.exp() * (stock - ours)).sum(-1).mean().item()

    found = {name: divergence(name) for name in FORMATS}
    assert all(abs(found[name]) < DIVERGENCE[name] for name in FORMATS), found
    # Fewer bits cost more, by far.
    assert max(found["int8"], found["fp8"]) < min(found["int4_g32"], found["int4_g32_zp"])
    assert found["int4_g32"] < found["int4_g128"] < found["mxfp4"]


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
