"""Perplexity of the model that ships with the package, on the text that it was not trained on."""

from __future__ import annotations

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktcompile.models import tiny_model

WINDOW = 512


def text_windows() -> torch.Tensor:
    """Return the evaluation text in windows, [N, 512]."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path())
    ids = tokenizer((tiny_model.path() / "eval.txt").read_text(), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def load(dtype: torch.dtype) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path(), dtype=dtype, experts_implementation="grouped_mm")
    return model.eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = []
    for ids in windows:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return those of every next token, [N, 512, V]."""
    return torch.stack([model(ids[None], use_cache=False).logits[0].float().log_softmax(-1) for ids in windows])


def compiled(model: torch.nn.Module, weight_format: str = "auto") -> torch.nn.Module:
    """Return a model whose experts run on the kernels."""
    torch._dynamo.reset()
    return torch.compile(model, backend="kt", options={"inner": "program", "weight_format": weight_format})
