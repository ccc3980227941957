"""The model that ships with the package: real text, real routing, and a perplexity that the backend keeps."""

from __future__ import annotations

import pytest
import torch
from helpers.perplexity import compiled_perplexity, load, perplexity, text_windows

import ktcompile
from ktcompile.quant import FORMATS

# By how much perplexity may rise, relative; measured is about half of it.
MORE_PERPLEXITY = {
    "fp32": 1e-5,
    "fp16": 1e-5,
    "bf16": 1e-4,
    "int8": 1e-4,
    "int8_dyn": 1e-4,
    "int4_g32": 0.006,
    "int4_g64": 0.006,
    "int4_g128": 0.01,
    "int4_g32_zp": 0.006,
    "int4_g64_zp": 0.006,
    "int4_g128_zp": 0.01,
    "fp8": 0.001,
    "fp8_channel": 0.001,
    "mxfp4": 0.014,
}


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """The evaluation text in windows, [N, 512]."""
    return text_windows()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backend_keeps_the_perplexity(dtype: torch.dtype, windows: torch.Tensor) -> None:
    model = load(dtype)
    stock = perplexity(model, windows)
    ours = compiled_perplexity(model, windows)
    report = ktcompile.compile_reports()[-1]
    assert report.moe_fused == report.moe_found == model.config.num_hidden_layers
    assert ours == pytest.approx(stock, rel=1e-3)
    assert stock < 25  # the text is one that it has learnt to predict


@pytest.mark.slow
def test_formats_keep_the_perplexity(windows: torch.Tensor) -> None:
    model = load(torch.float32)
    stock = perplexity(model, windows)
    more = {name: compiled_perplexity(model, windows, name) / stock - 1 for name in FORMATS}
    assert all(abs(more[name]) < MORE_PERPLEXITY[name] for name in FORMATS), more
    # Fewer bits cost more, by far.
    assert max(abs(more["int8"]), abs(more["fp8"])) < min(more["int4_g32"], more["int4_g32_zp"])
    assert more["int4_g32"] < more["int4_g128"] < more["mxfp4"]


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
