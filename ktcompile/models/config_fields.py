"""What a model is made of by the usual fields of configurations, where transformers cannot build it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ktcompile.models.source import ModelSource
from ktcompile.plan.architecture import Architecture, LayerCache, RoutedExperts
from ktcompile.quant import FORMATS

Fields = Mapping[str, Any]

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "top_k")
_NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_INTERMEDIATE = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def architecture(
    source: ModelSource, fields: Fields, dtype_bytes: int, stored_format: str, notes: tuple[str, ...]
) -> Architecture:
    """Return what a decoder of the usual kind with these fields is made of. Norms and biases are not counted.

    ValueError: a field that every such model has is missing.
    """
    text: Fields = fields.get("text_config") or fields
    layers, hidden, vocabulary = (_number(text, (n,)) for n in ("num_hidden_layers", "hidden_size", "vocab_size"))
    sparse = moe_layers(text) if any(name in text for name in _NUM_EXPERTS) else []
    routed = tuple(_routed(text, layer) for layer in sparse)
    kept = cache(text, dtype_bytes)
    tied = bool(text.get("tie_word_embeddings", False))
    read = sum(_attention(text) + _dense_mlp(text, layer in sparse) for layer in range(layers)) + hidden * vocabulary
    dense = read if tied else read + hidden * vocabulary
    experts = sum(e.parameters for e in routed)
    growing = sum(layer.window is None and layer.bytes_per_token > 0 for layer in kept)
    stored = None if source.tensors is None else sum(t.size for t in source.tensors)
    computed = round(experts * FORMATS[stored_format].bytes_per_weight) + dense * dtype_bytes
    return Architecture(
        name=source.name,
        model_type=str(fields.get("model_type", "unknown")),
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocabulary,
        dtype_bytes=dtype_bytes,
        parameters=experts + dense,
        dense_bytes=dense * dtype_bytes,
        dense_read_bytes=read * dtype_bytes,
        dense_flops_per_token=2 * read,
        attention_flops=4 * growing * _heads(text) * _value_width(text),
        experts=routed,
        cache=kept,
        stored_format=stored_format,
        stored_bytes=computed if stored is None else stored,
        notes=notes,
    )


def top_k(fields: Fields) -> int:
    """Return experts per token. ValueError: no field tells."""
    return _number(fields, _TOP_K)


def moe_layers(fields: Fields) -> list[int]:
    """Return which layers have experts, by the fields that leave some of them dense."""
    count = _number(fields, ("num_hidden_layers",))
    frequency = fields.get("moe_layer_freq")
    if isinstance(frequency, Sequence):
        return [i for i in range(count) if i < len(frequency) and frequency[i]]
    kinds = fields.get("mlp_layer_types")
    if isinstance(kinds, Sequence):
        return [i for i in range(count) if i < len(kinds) and kinds[i] == "sparse"]
    step = fields.get("decoder_sparse_step") or frequency or 1
    first = fields.get("first_k_dense_replace") or 0
    dense = set(fields.get("mlp_only_layers") or ())
    # Qwen counts layers from one, DeepSeek from zero; with a step of one both are all layers.
    offset = 1 if "decoder_sparse_step" in fields else 0
    return [i for i in range(count) if i >= first and i not in dense and (i + offset) % step == 0]


def cache(fields: Fields, element_bytes: int) -> tuple[LayerCache, ...]:
    """Return what each layer keeps of a sequence. The state of linear attention is not known from here: none."""
    kinds = fields.get("layer_types") or ["full_attention"] * _number(fields, ("num_hidden_layers",))
    size = _kv_width(fields) * element_bytes
    window = fields.get("sliding_window")
    layers = []
    for kind in kinds:
        if "sliding" in str(kind) and window:
            layers.append(LayerCache(size, max(0, int(window) - 1)))
        else:
            layers.append(LayerCache(size) if "attention" in str(kind) and "linear" not in str(kind) else LayerCache())
    return tuple(layers)


def _routed(fields: Fields, layer: int) -> RoutedExperts:
    hidden, experts = _number(fields, ("hidden_size",)), _number(fields, _NUM_EXPERTS)
    return RoutedExperts(layer, experts, top_k(fields), hidden, _number(fields, _INTERMEDIATE))


def _dense_mlp(fields: Fields, sparse: bool) -> int:
    """Return weights of a layer's products beside attention and routed experts: shared experts and router, or MLP."""
    hidden = _number(fields, ("hidden_size",))
    if not sparse:
        return 3 * hidden * _number(fields, ("intermediate_size", *_INTERMEDIATE))
    shared = next((int(fields[name]) for name in _SHARED if fields.get(name)), 0) * _number(fields, _INTERMEDIATE)
    shared = int(fields.get("shared_expert_intermediate_size") or shared)
    return 3 * hidden * shared + hidden * _number(fields, _NUM_EXPERTS)


def _attention(fields: Fields) -> int:
    """Return weights of a layer's attention."""
    hidden, heads = _number(fields, ("hidden_size",)), _heads(fields)
    if not fields.get("kv_lora_rank"):
        return hidden * (2 * heads * _value_width(fields) + _kv_width(fields))
    rank, rope = int(fields["kv_lora_rank"]), int(fields["qk_rope_head_dim"])
    query = heads * (int(fields["qk_nope_head_dim"]) + rope)
    low = fields.get("q_lora_rank")
    queries = low * (hidden + query) if low else hidden * query
    value = _value_width(fields)
    keys = hidden * (rank + rope) + rank * heads * (int(fields["qk_nope_head_dim"]) + value)
    return int(queries + keys + heads * value * hidden)


def _kv_width(fields: Fields) -> int:
    """Return elements that one token keeps in a layer with attention."""
    if fields.get("kv_lora_rank"):
        return int(fields["kv_lora_rank"]) + int(fields["qk_rope_head_dim"])
    return 2 * int(fields.get("num_key_value_heads") or _heads(fields)) * _value_width(fields)


def _heads(fields: Fields) -> int:
    return _number(fields, ("num_attention_heads",))


def _value_width(fields: Fields) -> int:
    own = fields.get("v_head_dim") or fields.get("head_dim")
    return int(own) if own else _number(fields, ("hidden_size",)) // _heads(fields)


def _number(fields: Fields, names: tuple[str, ...]) -> int:
    for name in names:
        value = fields.get(name)
        value = max(value, default=None) if isinstance(value, list) else value
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(f"the configuration has no {' or '.join(names)}; is it one of a language model with experts?")
