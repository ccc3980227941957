"""Replaces what was traced in each experts module by one `kt::experts` node.

Changes numbers: experts accumulate in fp32 and round once where the stock code rounds after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ktcompile.graph.gradients import needs_gradients
from ktcompile.graph.owners import ParameterOwners
from ktcompile.graph.regions import MoeRegion, find_regions, is_moe
from ktcompile.graph.report import CompileReport
from ktcompile.log import warn_once


def fuse_moe(owners: ParameterOwners) -> Callable[[fx.GraphModule, Sequence[object], CompileReport], int]:
    """Return the pass for a graph whose parameters have these owners."""

    def run(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
        """Return how many experts modules were fused. The others are left as they are, with the reason."""
        regions = find_regions(gm, example_inputs, owners)
        reason = _why_not_now(example_inputs)
        fused = 0
        for region in regions:
            if isinstance(region, str) or reason:
                why = region if isinstance(region, str) else f"{region.path}: {reason}"
                report.fallbacks.append(why)
                warn_once(f"left to the stock implementation: {why}")
            else:
                _replace(gm, region)
                fused += 1
        report.moe_fused = sum(is_moe(n) for n in gm.graph.nodes)
        return fused

    return run


def _why_not_now(example_inputs: Sequence[object]) -> str | None:
    """The backward of a fused layer is missing, so a graph that needs gradients keeps the stock layers."""
    if needs_gradients(example_inputs):
        return "gradients are enabled; the fused experts only run forward, under torch.no_grad()"
    return None


def _replace(gm: fx.GraphModule, region: MoeRegion) -> None:
    with gm.graph.inserting_after(region.output):
        new = gm.graph.call_function(
            torch.ops.kt.experts.default, (*region.inputs, *region.weights, region.spec.encode())
        )
    new.meta = dict(region.output.meta)
    region.output.replace_all_uses_with(new)
    for node in reversed(region.nodes):
        if not node.users:  # sizes that were first computed here stay for their users outside
            gm.graph.erase_node(node)
