"""Facts of whole models by name, for simulations."""

from __future__ import annotations

from ktcompile.bench.shapes import PRESETS
from ktcompile.plan.facts import ModelFacts, MoeLayerFacts

# MoE layers, and the weights beside the routed experts that every token reads: all published weights, less the experts
# and the input embedding.
_WHOLE = {
    "tiny": (4, 6_000_000),
    "olmoe-1b-7b": (16, 380_000_000),
    "qwen3-30b-a3b": (48, 1_200_000_000),
    "qwen3-235b-a22b": (94, 7_200_000_000),
    "qwen3-next-80b-a3b": (48, 2_300_000_000),
    "deepseek-v3": (58, 16_000_000_000),
    "kimi-k2": (60, 10_000_000_000),
    "gpt-oss-120b": (36, 1_500_000_000),
    "mixtral-8x7b": (32, 1_450_000_000),
}
MODELS = tuple(_WHOLE)


def model_facts(name: str, weight_bytes: float = 1.0) -> ModelFacts:
    """Return the facts of a model whose weights take so many bytes each. ValueError: its name is unknown, or the
    number is not positive."""
    if name not in _WHOLE:
        raise ValueError(f"model shape {name!r} is unknown; there are {', '.join(MODELS)}")
    if not weight_bytes > 0:
        raise ValueError(f"a weight cannot take {weight_bytes} bytes")
    shape, (layers, dense) = PRESETS[name], _WHOLE[name]
    size = round(shape.expert_weights * weight_bytes)
    layer = MoeLayerFacts(shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size, size)
    return ModelFacts((layer,) * layers, round(dense * weight_bytes), 2 * dense)
