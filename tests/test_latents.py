"""Engines of models with latent attention (MLA): what they keep, and that answers are those of transformers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.engines import SMALL, engine_of, prompts, serve, tiny
from helpers.moe_models import build, case_of
from helpers.text_model import byte_level_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.probe import UnsupportedModelError
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.log import warn_once
from ktcompile.models.latents import find

PROMPT = [*prompts(1, longest=60)[0], *range(40)][-50:]
COUNT = 200
# Of tiny models: a latent of 20 and a rotated part of 8; and keys of 18 and values of 14 of four heads.
LATENT, EXPANDED = 2 * 28, 2 * 4 * (18 + 14)
# Whose attention is of the same pattern, of those that an engine can run.
FAMILIES = ("deepseek_v2", "deepseek_v3", "mistral4", "axk1", "glm4_moe_lite", "kimi_linear", "bailing_hybrid")
# No experts that transformers dispatches, or more attention layers than others; their configurations.
OTHERS: dict[str, dict[str, Any]] = {"minicpm3": {}, "youtu": {}, "longcat_flash": {"num_layers": 1}}
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 56,
    "ffn_hidden_size": 56,
    "expert_ffn_hidden_size": 24,
    "n_routed_experts": 6,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def fresh(threads: Callable[[int], None]) -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    warn_once.cache_clear()
    yield
    torch._dynamo.reset()


def other(family: str) -> Any:
    """Return a tiny random model of one of OTHERS."""
    known = AutoConfig.for_model(family).to_dict()
    config = AutoConfig.for_model(family, **{k: v for k, v in _SIZES.items() if k in known}, **OTHERS[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def stock_tokens(model: Any, count: int) -> tuple[list[int], Tensor]:
    """Return greedy tokens behind PROMPT as transformers' own attention and experts give them, and their logits."""
    tokens, logits, cache = list(PROMPT), [], DynamicCache(config=model.config)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(count):
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
            ids = torch.tensor([tokens[-1:]])
    return tokens[len(PROMPT) :], torch.stack(logits)


def answer(engine: Engine, count: int) -> list[int]:
    return serve(engine, [(PROMPT, SamplingParams(count, 0.0, ignore_eos=True))])[0].token_ids


def position_bytes(engine: Engine) -> int:
    return sum(layer.bytes_per_token for layer in engine._runner.layers)


def logits_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that the logits of each step come to."""
    seen: list[Tensor] = []
    run = engine._runner.run

    def noted(step: Any) -> Any:
        logits = run(step)
        seen.extend(logits.values)
        return logits

    monkeypatch.setattr(engine._runner, "run", noted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_greedy_tokens_in_fp32_are_transformers_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits too are those of its attention over expanded keys and values up to rounding."""
    model = tiny(family)
    model.set_experts_implementation("eager")
    wanted, wanted_logits = stock_tokens(model, COUNT)
    engine = engine_of(tiny(family))
    assert all(layer.latent_dim == 20 for layer in engine._runner.layers)
    seen = logits_of(engine, monkeypatch)
    assert answer(engine, COUNT) == wanted
    got = torch.stack(seen[-COUNT:])
    assert relative_error(got, wanted_logits) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_in_bf16_logits_are_as_near_to_fp32_as_those_of_expanded_ones(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = tiny(family, torch.bfloat16).float()
    with torch.no_grad():
        wanted = exact(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    errors = {}
    for storage in ("latent", "expanded"):
        torch._dynamo.reset()
        engine = engine_of(tiny(family, torch.bfloat16), mla_storage=storage)
        seen = logits_of(engine, monkeypatch)
        answer(engine, 1)
        errors[storage] = relative_error(seen[-1], wanted)
    assert errors["latent"] < 2 * errors["expanded"] < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_pattern_keep_latents(family: str) -> None:
    model = tiny(family)
    wanted, _ = stock_tokens(model, 8)
    engine = engine_of(model, eager=True)
    assert position_bytes(engine) == 4 * LATENT and answer(engine, 8) == wanted


@pytest.mark.parametrize("family", OTHERS)
def test_so_do_those_of_other_models(family: str) -> None:
    model = other(family)
    assert len(find(model).layers) == 2
    wanted, _ = stock_tokens(model, 8)
    engine = engine_of(model, eager=True)
    assert position_bytes(engine) == 4 * LATENT and answer(engine, 8) == wanted


@pytest.mark.parametrize(
    ("storage", "size", "words"), [("latent", LATENT, "latents"), ("expanded", EXPANDED, "keys and values")]
)
def test_an_engine_says_what_it_keeps_and_has_blocks_for_its_bytes(storage: str, size: int, words: str) -> None:
    wanted, _ = stock_tokens(tiny("deepseek_v3"), 8)
    notes: list[str] = []
    options = EngineOptions(**{**SMALL, "kv_device_memory": 1 << 17, "eager": True, "mla_storage": storage})
    engine = Engine.of_model(tiny("deepseek_v3"), byte_level_tokenizer(), options, note=notes.append)
    assert answer(engine, 8) == wanted
    assert engine.stats().num_blocks == (1 << 17) // (8 * 4 * size)
    assert any(f"of {words} in fp32, {4 * size:,} bytes each" in note for note in notes)


def expand_otherwise(module: Any, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    key, value = type(module).expand_kv(module, latent, rotated)
    return key, 1.1 * value


class Adapted(nn.Module):
    """A projection with something beside it, as adapters have."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 0.9


def with_bias(module: Any) -> None:
    module.kv_b_proj.bias = nn.Parameter(torch.ones(len(module.kv_b_proj.weight)))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "bias": (with_bias, "must be a linear layer without bias"),
    "adapter": (lambda m: setattr(m, "kv_b_proj", Adapted(m.kv_b_proj)), "must be a linear layer without bias"),
    "values": (lambda m: setattr(m, "expand_kv", expand_otherwise.__get__(m)), "values are not what kv_b_proj makes"),
    "sizes": (lambda m: setattr(m, "v_head_dim", 13), "shape|size|its keys are"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_expands_latents_in_another_way_keeps_keys_and_values(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, (make, words) = tiny("deepseek_v3"), CHANGES[change]
    make(model.model.layers[1].self_attn)
    found = find(model)
    assert not found.layers and re.search(words, found.why_not)
    if change == "sizes":
        return  # this is no model
    wanted, _ = stock_tokens(model, 8)
    with caplog.at_level(logging.WARNING, logger="ktcompile"):
        engine = engine_of(model, eager=True)
    assert position_bytes(engine) == 4 * EXPANDED and answer(engine, 8) == wanted
    assert "keeps the keys and values of all heads: model.layers.1.self_attn" in caplog.text


def test_latents_that_would_share_scales_are_expanded() -> None:
    model = build(case_of("deepseek_v3"), torch.float32, max_position_embeddings=256, kv_lora_rank=120)[0]
    assert engine_of(model, eager=True, kv_format="bf16")._runner.layers[0].latent_dim == 120
    assert engine_of(model, eager=True, kv_format="int8")._runner.layers[0].latent_dim == 0


def test_latents_in_int8_are_kept_with_their_scales() -> None:
    """Those of the tiny model in one group."""
    engine = engine_of(tiny("deepseek_v3"), eager=True, kv_format="int8")
    assert position_bytes(engine) == LATENT + 2 * 4
    wanted, _ = stock_tokens(tiny("deepseek_v3"), 2)
    assert answer(engine, 2) == wanted


def test_a_model_that_is_refused_is_as_it_was() -> None:
    model = tiny("deepseek_v3")
    wanted, logits = stock_tokens(model, 3)
    model.config.get_text_config().sliding_window = 16
    with pytest.raises(UnsupportedModelError, match="tells attention None"):
        engine_of(model, eager=True)
    del model.config.get_text_config().sliding_window
    assert all("expand_kv" not in vars(module) for module in model.modules())
    assert torch.equal(stock_tokens(model, 3)[1], logits) and wanted


def test_models_without_latents_have_none_and_no_reason() -> None:
    found = find(tiny("qwen3_moe"))
    assert not found.layers and not found.why_not


def test_another_name_of_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="mla_storage is 'absorbed'; it must be one of latent, expanded"):
        EngineOptions(mla_storage="absorbed")
