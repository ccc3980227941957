"""The records by which the executable knows packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx
from torch._guards import detect_fake_mode

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
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    mode = detect_fake_mode([n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"])
    handle = torch.zeros(1, dtype=torch.int64)
    node.meta["example_value"] = mode.from_tensor(handle) if mode else handle
    node.meta[PACKED] = packed
    return node
