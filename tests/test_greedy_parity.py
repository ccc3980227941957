"""Greedy decoding with backend "kt", architecture by architecture: the tokens are those of the stock model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.moe_models import build, case_of
from torch import Tensor
from transformers import DynamicCache

import ktcompile
from ktcompile.graph.report import clear_compile_reports

pytestmark = pytest.mark.slow

TOKENS = 200


@dataclass(frozen=True, slots=True)
class Fused:
    """How many layers of experts and calls of attention of a model of two layers the kernels run. left_experts: layers
    of experts of the stock code. implementation: of attention; sdpa's calls are fused by a pass."""

    experts: int
    attention: int
    left_experts: int = 0
    implementation: str = "sdpa"


# The other layers are dense, or no softmax attention. Inkling2 has sdpa inside of an attention of its own.
FAMILIES = {
    "mixtral": Fused(2, 2),
    "qwen2_moe": Fused(2, 2),
    "qwen3_moe": Fused(2, 2),
    "olmoe": Fused(2, 2),
    "deepseek_v2": Fused(1, 2),
    "deepseek_v3": Fused(1, 2),
    "glm4_moe": Fused(1, 2),
    "gpt_oss": Fused(2, 2, implementation="kt"),
    "dots1": Fused(1, 2),
    "granitemoe": Fused(2, 2),
    "qwen3_next": Fused(2, 1),
    "inkling2": Fused(0, 4, left_experts=2, implementation="eager"),
}
# Softmax over the chosen experts, latents and groups of experts, sinks and windows: compiling all again takes a minute.
IN_BF16 = ("mixtral", "deepseek_v3", "gpt_oss")


@pytest.fixture(autouse=True)
def fresh(threads: Callable[[int], None]) -> Iterator[None]:
    """One thread: the layers are so small that threads only wait for each other."""
    threads(1)
    torch.set_num_threads(1)
    torch._dynamo.reset()
    clear_compile_reports()
    yield
    torch._dynamo.reset()


class Decoder:
    """A model with a cache. The prompt is the stock model's, whatever runs the steps after it."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model = self._step = model
        self._cache = DynamicCache(config=model.config)
        self.logits: list[Tensor] = [self._run(prompt)]  # [B, V] of each token so far

    def compile(self) -> None:
        self._step = torch.compile(self.model, backend="kt", options={"inner": "eager"}, dynamic=True)

    def next(self) -> Tensor:
        """Return the next tokens, [B]."""
        return self.logits[-1].argmax(-1)

    def feed(self, tokens: Tensor) -> None:
        self.logits.append(self._run(tokens[:, None]))

    def _run(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            output = self._step(input_ids=ids, past_key_values=self._cache, use_cache=True)
        return output.logits[:, -1].float()


def stock(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """Return a model with transformers' own experts and attention, and two prompts."""
    model, inputs = build(case_of(family), dtype, max_position_embeddings=256)
    model.set_experts_implementation("eager")
    return model, inputs["input_ids"]


def fused(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a decoder of the same model that is compiled after the prompt."""
    model, prompt = stock(family, dtype)
    decoder = Decoder(model, prompt)
    model.set_experts_implementation("grouped_mm")
    model.set_attn_implementation(FAMILIES[family].implementation)
    decoder.compile()
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_stock_model(family: str) -> None:
    wanted, got = Decoder(*stock(family)), fused(family)
    tokens: list[Tensor] = []
    for step in range(TOKENS):
        tokens.append(wanted.next())
        assert torch.equal(got.next(), tokens[-1]), f"token {step}"
        for decoder in (wanted, got):
            decoder.feed(tokens[-1])
    assert len(torch.stack(tokens).unique()) > 15, "the text is a few tokens, again and again"
    expected = FAMILIES[family]
    reports = ktcompile.compile_reports()
    assert reports
    for report in reports:
        assert (report.moe_fused, report.attention_fused) == (expected.experts, expected.attention)
        assert (len(report.fallbacks), report.attention_fallbacks) == (expected.left_experts, [])


@pytest.mark.parametrize("family", IN_BF16)
def test_the_first_token_that_differs_in_bf16_is_a_matter_of_rounding(family: str) -> None:
    """There the logits of an fp32 model with the same weights are ahead of those of either token by no more than two
    errors of bf16: the largest difference of the stock model's logits from fp32 so far. And ours are as near to fp32 as
    the stock ones, up to a factor of two, as in test_model_parity."""
    wanted, got = Decoder(*stock(family, torch.bfloat16)), fused(family, torch.bfloat16)
    model, prompt = stock(family, torch.bfloat16)
    exact = Decoder(model.float(), prompt)
    for _ in range(TOKENS):
        chosen = wanted.next(), got.next()
        if not torch.equal(*chosen):
            break
        for decoder in (wanted, got, exact):
            decoder.feed(chosen[0])
    true = torch.stack(exact.logits)
    error, stock_error = (torch.stack(decoder.logits) - true for decoder in (got, wanted))
    rounding = stock_error.abs().max()
    best = true[-1].amax(-1)
    for tokens in chosen:
        gap = (best - true[-1].gather(1, tokens[:, None])[:, 0]).max()
        assert gap <= 2 * rounding, f"token {len(true)}: {gap:.4f} behind the best, bf16 is {rounding:.4f} off"
    assert error.norm() <= 2 * stock_error.norm()
