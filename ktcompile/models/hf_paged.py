"""The attention implementation "kt_paged" of transformers: tokens of many sequences run through a model at once.

A step is one call, `model(input_ids=[1, T], position_ids=[1, T], use_cache=False, kv_step=PagedStep())`: the tokens of
all sequences one behind the other, each with its own position. No mask is made. Everything but attention computes
tokens by themselves; attention finds out of `kv_step` which sequence a token belongs to.

A layer of latent attention may be had to keep latents (`latents.py`): these are its keys and values then, and queries
and results are multiplied instead.

Shape suffixes: T tokens, H heads of queries, J heads of keys, D size of a key, V size of a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ktcompile.ops.cached_attention  # noqa: F401  (defines kt::cached_attention)
from ktcompile.models.latents import LatentSizes, into_latents, out_of_latents

NAME = "kt_paged"


class LayerBlocks(NamedTuple):
    """The storage of one layer, as of `ktcompile.ops.PagedKV`. of_latents: whether the layer keeps such."""

    key: Tensor
    value: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    of_latents: bool = False


class PagedStep(NamedTuple):
    """What attention has to know of a step. layers: by number. The rest: as of `kt::cached_attention`."""

    layers: tuple[LayerBlocks, ...]
    slot_mapping: Tensor
    block_table: Tensor
    lengths: Tensor
    query_starts: Tensor


class AttentionCall(NamedTuple):
    """What a layer asked of attention. latents: of what it keeps instead of keys and values. reason: why it cannot run
    over blocks; empty where it can."""

    layer: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int | None
    reason: str
    latents: LatentSizes | None = None


class Probe:
    """Stands for a `PagedStep` to learn what the layers ask of attention; they get zeros. latents: the modules that
    keep such."""

    def __init__(self, latents: Mapping[Any, LatentSizes] | None = None) -> None:
        self.calls: list[AttentionCall] = []
        self.latents = latents or {}


def register() -> None:
    """Register "kt_paged" with transformers, and no mask for it. Where transformers is absent or too old there is
    nothing to do."""
    try:
        from transformers.modeling_utils import AttentionInterface
    except ImportError:
        return
    AttentionInterface.register(NAME, attention_forward)


def attention_forward(
    module: Any,
    query_1HTD: Tensor,
    key_1JTD: Tensor,
    value_1JTV: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    kv_step: PagedStep | Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Store the keys and values of a step and return its attention, [1, T, H, V], and no weights.

    s_aux: sinks, [H]. sliding_window: a token sees so many positions. ValueError: the model gives no `kv_step`.
    """
    if kv_step is None:
        raise ValueError(f'attention "{NAME}" of {type(module).__name__} was called without kv_step')
    if isinstance(kv_step, Probe):
        causal = module.is_causal if is_causal is None else is_causal
        reason = _why_not(attention_mask, dropout, causal, position_bias)
        _, heads, tokens, _ = query_1HTD.shape
        latents = kv_step.latents.get(module)
        if latents is not None and latents.heads != heads:
            reason = f"{heads} heads of queries share {latents.heads} of keys that latents are expanded to"
        kept = heads, key_1JTD.shape[1], key_1JTD.shape[3], value_1JTV.shape[3]
        rest = key_1JTD.dtype, sliding_window, reason, latents
        kv_step.calls.append(AttentionCall(module.layer_idx, *kept, *rest))
        value_size = value_1JTV.shape[3] if latents is None else latents.value
        return query_1HTD.new_zeros(1, tokens, heads, value_size), None
    *blocks, of_latents = kv_step.layers[module.layer_idx]
    sinks = None if s_aux is None else s_aux.float()
    out: Tensor = torch.ops.kt.cached_attention.default(
        *blocks,
        into_latents(module, query_1HTD) if of_latents else query_1HTD,
        key_1JTD,
        None if of_latents else value_1JTV,
        kv_step.slot_mapping,
        kv_step.block_table,
        kv_step.lengths,
        kv_step.query_starts,
        sinks,
        sliding_window,
        scaling,
        softcap,
    )
    return out_of_latents(module, out) if of_latents else out, None


def _why_not(mask: Tensor | None, dropout: float, causal: bool, position_bias: Tensor | None) -> str:
    if mask is not None:
        return "it makes a mask of its own"
    if dropout > 0:
        return f"dropout is {dropout}"
    if not causal:
        return "it is not causal"
    return "" if position_bias is None else "it has a position bias"
