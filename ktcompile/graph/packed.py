"""The records by which the executable knows packed weights."""

from __future__ import annotations

from dataclasses import dataclass

from ktcompile.ops.spec import ExpertsSpec

PACKED = "kt_packed"  # key in a placeholder's meta


@dataclass(frozen=True, slots=True)
class PackedInput:
    """positions: of gate_up_proj, down_proj, gate_up_bias, down_bias among the graph's original inputs. top_k: experts
    of each token."""

    positions: tuple[int | None, ...]
    spec: ExpertsSpec
    top_k: int


@dataclass(frozen=True, slots=True)
class GivenInput:
    """Weights that a model holds packed. position: of their handle among the graph's original inputs."""

    position: int
    top_k: int
