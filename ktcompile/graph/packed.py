"""The records by which the executable knows packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ktcompile.ops.spec import ExpertsSpec, LatentsSpec, LinearSpec

PACKED = "kt_packed"  # key in a placeholder's meta


@dataclass(frozen=True, slots=True)
class PackedInput:
    """positions: of a layer's weights, then its biases, among the graph's original inputs; None: it has no such bias.
    top_k: experts of each token, of an MoE layer. part: which of its two uses, "keys" or "values", of a weight that
    expands latents."""

    positions: tuple[int | None, ...]
    spec: ExpertsSpec | LinearSpec | LatentsSpec
    top_k: int | None = None
    part: Literal["keys", "values"] | None = None


@dataclass(frozen=True, slots=True)
class GivenInput:
    """Weights that a model holds packed. position: of their handle among the graph's original inputs."""

    position: int
    top_k: int


def add_packed_input(gm: fx.GraphModule, name: str, packed: PackedInput) -> fx.Node:
    """Return a new placeholder, behind all others, which the executable fills with the handle of a packed layer."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    with gm.graph.inserting_after(placeholders[-1]):
        node = gm.graph.placeholder(name)
    values = (n.meta.get("example_value") for n in placeholders)
    like = next(v for v in values if isinstance(v, torch.Tensor))  # fake where theirs are
    node.meta["example_value"] = like.new_zeros(1, dtype=torch.int64, device="cpu")
    node.meta[PACKED] = packed
    return node
