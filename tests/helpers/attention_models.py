"""Tiny random models, one for each kind of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    MistralConfig,
    Qwen3MoeConfig,
)

from helpers.moe_models import randomise

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 299,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}

CONFIGS: dict[str, Any] = {
    "groups": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_experts=4, num_key_value_heads=2, head_dim=16),
    "plain": lambda: MistralConfig(**_SIZES, num_key_value_heads=4, head_dim=16, sliding_window=None),
    "window": lambda: MistralConfig(**_SIZES, num_key_value_heads=2, head_dim=16, sliding_window=6),
    "softcap": lambda: Gemma2Config(
        **_SIZES, num_key_value_heads=2, head_dim=16, sliding_window=6, attn_logit_softcapping=3.0
    ),
    "sinks": lambda: GptOssConfig(
        **_SIZES, num_key_value_heads=2, head_dim=16, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
    "latents": lambda: DeepseekV3Config(
        **_SIZES,
        **_EXPERTS,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
    ),
}


def build(kind: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of a kind that uses one attention implementation; the same weights each time."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=attention).to(dtype).eval()
    randomise(model, 5)
    return model


def padded_prompts() -> tuple[Tensor, Tensor]:
    """Return two prompts, the second padded on the left, and their mask, [2, 11] each."""
    ids = torch.randint(2, 290, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask
