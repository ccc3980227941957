"""Shapes of MoE layers: those of real models, and two awkward ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoeShape:
    """num_experts, top_k: of the router. hidden_size, intermediate_size: of each expert, gated."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, more than the {self.num_experts} experts")

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.top_k * self.expert_weights

    def bytes(self, distinct_experts: float, bytes_per_weight: float) -> float:
        """Weights read for a call that touches this many experts."""
        return distinct_experts * self.expert_weights * bytes_per_weight


PRESETS = {
    "tiny": MoeShape(16, 4, 256, 128),
    "olmoe-1b-7b": MoeShape(64, 8, 2048, 1024),
    "qwen3-30b-a3b": MoeShape(128, 8, 2048, 768),
    "qwen3-235b-a22b": MoeShape(128, 8, 4096, 1536),
    "qwen3-next-80b-a3b": MoeShape(512, 10, 2048, 512),
    "deepseek-v2-lite": MoeShape(64, 6, 2048, 1408),
    "deepseek-v3": MoeShape(256, 8, 7168, 2048),
    "kimi-k2": MoeShape(384, 8, 7168, 2048),
    "glm-4.5-air": MoeShape(128, 8, 4096, 1408),
    "gpt-oss-20b": MoeShape(32, 4, 2880, 2880),
    "gpt-oss-120b": MoeShape(128, 4, 2880, 2880),
    "mixtral-8x7b": MoeShape(8, 2, 4096, 14336),
    # Ours: multiples of 32 that blocks of 64 or 128 do not divide.
    "odd-small": MoeShape(12, 3, 1056, 352),
    "odd-wide": MoeShape(6, 2, 5120, 1184),
}
