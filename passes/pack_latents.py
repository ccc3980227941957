"""Turns the products of attention over latents into `kt::head_linear` on packed weights.

The weight that expands latents is packed once for both of its uses, for queries and for results; its packed parts enter
the graph as weights of linear layers do. Changes numbers: products are summed in the order of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from ktcompile.config import CompileOptions
from ktcompile.graph.packed import PackedInput, add_packed_input
from ktcompile.graph.report import CompileReport
from ktcompile.ops.spec import LatentsSpec

_PARTS: dict[object, Literal["keys", "values"]] = {
    torch.ops.kt.into_latents.default: "keys",
    torch.ops.kt.out_of_latents.default: "values",
}


def pack_latents(
    options: CompileOptions,
) -> Callable[[fx.GraphModule, Sequence[object], CompileReport], int]:
    """Return the pass for `options`, whose ISA and format of dense layers hold for every weight."""

    def run(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        nodes = [n for n in gm.graph.nodes if n.target in _PARTS and n.args[1] in placeholders and _is_known(n)]
        for number, node in enumerate(nodes):
            x, weight, *_ = node.args
            heads, size = _sizes(x)
            rows, latent_size = _sizes(weight)
            part = _PARTS[node.target]
            key_size, features = (size, latent_size) if part == "keys" else (rows // heads - node.args[2], node.args[2])
            spec = LatentsSpec(heads, key_size, options.dense_format, options.isa)
            source = PackedInput((placeholders.index(weight),), spec, part=part)
            handle = add_packed_input(gm, f"packed_latents_{number}", source)
            with gm.graph.inserting_before(node):
                linear = gm.graph.call_function(torch.ops.kt.head_linear.default, (x, handle, features))
            linear.meta = dict(node.meta)
            node.replace_all_uses_with(linear)
            gm.graph.erase_node(node)
        return len(nodes)

    return run


def _sizes(node: Any) -> tuple[int, int]:
    rows, columns = node.meta["example_value"].shape[-2:]
    return rows, columns


def _is_known(node: fx.Node) -> bool:
    """Return whether heads and sizes are numbers."""
    return all(isinstance(n, int) for n in (*_sizes(node.args[0]), *node.args[2:]))
