"""The attention implementation "kt" of transformers: `from_pretrained(..., attn_implementation="kt")`.

Shape suffixes: B sequences, H heads of queries, J heads of keys, Q queries, S positions, D size of a key, V size of a
value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ktcompile.ops.attention  # noqa: F401  (defines kt::attention)
from ktcompile.models.traced import note
from ktcompile.quant import FLOAT_DTYPES

NAME = "kt"


def register() -> None:
    """Register "kt" with transformers. Where transformers is absent or too old there is nothing to do.

    Masks are those of "sdpa": boolean, or none where the causal rule says the same.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError:
        return
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: Any,
    query_BHQD: Tensor,
    key_BJSD: Tensor,
    value_BJSV: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention, [B, Q, H, V], and no weights: from the kernels, or from sdpa where they cannot run it.

    attention_mask: bool or to add, [B, 1 or H, Q, S]. s_aux: sinks, [H]. The window of a layer is in its mask.
    ValueError: sdpa cannot run it either.
    """
    reason = _why_not(query_BHQD, key_BJSD, value_BJSV, dropout, position_bias, kwargs)
    if reason:
        if softcap is not None or s_aux is not None:
            raise ValueError(f'attention "kt" cannot run {type(module).__name__}: {reason}; use "eager" for it')
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return _stock(module, query_BHQD, key_BJSD, value_BJSV, attention_mask, reason, **options, **kwargs)
    causal = module.is_causal if is_causal is None else is_causal
    queries = query_BHQD.shape[2]
    causal = queries > 1 and attention_mask is None and causal
    if causal and key_BJSD.shape[2] > queries:
        # The first tokens, in a cache that is longer than they are.
        key_BJSD, value_BJSV = key_BJSD[:, :, :queries], value_BJSV[:, :, :queries]
    out_BHQV: Tensor = torch.ops.kt.attention.default(
        query_BHQD, key_BJSD, value_BJSV, attention_mask, s_aux, None, causal, None, None, scaling, softcap, None
    )
    return out_BHQV.transpose(1, 2), None


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, position_bias: Tensor | None, kwargs: dict[str, Any]
) -> str:
    """Return why the kernels cannot run a call; empty where they can."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are enabled; the fused attention only runs forward, under torch.no_grad()"
    if query.device.type != "cpu":
        return f"its tensors are on {query.device}"
    if query.dtype not in FLOAT_DTYPES or key.dtype not in FLOAT_DTYPES or key.dtype != value.dtype:
        return f"its tensors are {query.dtype}, {key.dtype} and {value.dtype}"
    if dropout > 0:
        return f"dropout is {dropout}"
    if position_bias is not None:
        return "it has a position bias"
    return "" if kwargs.get("cache") is None else "its cache is transformers' paged one"


def _stock(module: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    *inputs, reason = args
    note(f"{type(module).__name__} is left to sdpa: {reason}")
    result: tuple[Tensor, None] = sdpa_attention_forward(module, *inputs, **options)
    return result
