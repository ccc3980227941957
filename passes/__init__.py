"""The passes, in the order in which they run, and why in that order.

1. fuse_moe: what was traced in an experts module becomes one `kt::experts`. First, while Dynamo's record of
   modules still stands.
2. fuse_norm: what was traced in a root-mean-square normalisation becomes one `kt::rms_norm`.
3. fuse_add_norm: a sum and its norm become one `kt::add_rms_norm`.
4. fuse_rotary: each rotary embedding becomes one `kt::rotary`, with the norm before it, which pass 2 found.
5. fuse_attention: each `scaled_dot_product_attention` becomes a `kt::attention`.
6. pack_moe: each `kt::experts`, from pass 1 or from the experts implementation "kt", becomes a `kt::moe` on
   packed weights, which the executable supplies.
7. pack_linear: linear layers on constant weights become `kt::linear`, on packed weights too.
8. pack_latents: what attention over latents multiplies queries and results by becomes `kt::head_linear`, likewise.
9. split_experts, where there is a device: each `kt::moe` becomes a part for the CPU and a part for the device.
10. overlap: the CPU's part begins as early and is waited for as late as the graph allows.
"""

from __future__ import annotations

from collections.abc import Sequence

from ktcompile.passes.fuse_add_norm import fuse_add_norm
from ktcompile.passes.fuse_attention import fuse_attention
from ktcompile.passes.fuse_moe import fuse_moe
from ktcompile.passes.fuse_norm import fuse_norm
from ktcompile.passes.fuse_rotary import fuse_rotary
from ktcompile.passes.overlap import overlap
from ktcompile.passes.pack_latents import pack_latents
from ktcompile.passes.pack_linear import pack_linear
from ktcompile.passes.pack_moe import pack_moe
from ktcompile.passes.split_experts import split_experts

from ktcompile.config import CompileOptions
from ktcompile.graph.owners import ParameterOwners
from ktcompile.graph.pipeline import Pass


def passes_for(options: CompileOptions, owners: ParameterOwners) -> Sequence[Pass]:
    """Return the passes to run on a graph, whose parameters have these owners. ValueError: `options` disables one that
    does not exist."""
    every = [
        Pass("fuse_moe", fuse_moe(owners), exact=False),
        Pass("fuse_norm", fuse_norm(owners), exact=False),
        Pass("fuse_add_norm", fuse_add_norm, exact=True),
        Pass("fuse_rotary", fuse_rotary, exact=True),
        Pass("fuse_attention", fuse_attention(options), exact=False),
        Pass("pack_moe", pack_moe(options), exact=True),
        Pass("pack_linear", pack_linear(options), exact=False),
        Pass("pack_latents", pack_latents(options), exact=False),
    ]
    if options.device != "none":
        every += [Pass("split_experts", split_experts, exact=False), Pass("overlap", overlap, exact=True)]
    names = [p.name for p in every]
    for name in options.disable_passes:
        if name not in names:
            raise ValueError(f"disable_passes has {name!r}, which is no pass; there are {', '.join(names)}")
    return [p for p in every if p.name not in options.disable_passes]
