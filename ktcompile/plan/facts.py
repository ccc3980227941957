"""What placement must know of a model: sizes and counts, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoeLayerFacts:
    """One MoE layer. expert_bytes: of one expert as packed. gated: whether it has a gate beside the up product."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    expert_bytes: int
    gated: bool = True

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size", "expert_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, which is more than the {self.num_experts} experts")

    @property
    def flops_per_row(self) -> int:
        """Operations that one expert takes for one token."""
        return 2 * (3 if self.gated else 2) * self.hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as placement sees it.

    dense_bytes: of all weights but the routed experts, as they are held. dense_flops_per_token: of their products.
    kv_bytes_per_token: of the keys and values of all layers.
    """

    layers: tuple[MoeLayerFacts, ...]
    dense_bytes: int = 0
    dense_flops_per_token: int = 0
    kv_bytes_per_token: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(layer.num_experts * layer.expert_bytes for layer in self.layers)
