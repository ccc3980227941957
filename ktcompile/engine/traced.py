"""A step's graph, called without what Dynamo does around it.

Around a graph Dynamo sets the state of its frames, and gathers what the graph is given from the model's modules: a
fifth of a millisecond of Python for each step of decode, where weights from memory leave nothing in the caches. An
engine's model and storage are its own, so only what a step brings anew has to be given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ktcompile.backend import kt
from ktcompile.engine.step_graph import FromStep, StepGraph
from ktcompile.runtime.executable import Executable


class TracedStep:
    """A backend of `torch.compile` that keeps the graph of a function of tensors.

    steps: the tensors of the call that is traced, the function's arguments; all else that the graph is given stays.
    """

    def __init__(self, step: Sequence[Tensor]) -> None:
        self._step = step
        self._graphs: list[StepGraph | None] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        compiled = kt(gm, example_inputs, **options)
        self._graphs.append(self._graph_of(compiled, gm, example_inputs) if isinstance(compiled, Executable) else None)
        return compiled

    def graph(self) -> StepGraph | None:
        """Return the one graph that there is, or None if it cannot be called by itself."""
        return self._graphs[0] if len(self._graphs) == 1 else None

    def _graph_of(self, compiled: Executable, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> StepGraph | None:
        alone = compiled.with_layers_of(example_inputs)
        if alone is None:
            return None
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        sizes = self._sizes(placeholders, example_inputs)
        given: list[Any] = [None] * len(alone.kept)
        from_step: list[FromStep] = []
        for place, i in enumerate(alone.kept):
            value = example_inputs[i]
            if not placeholders[i].users:  # as where tensors begin in their memory
                continue
            if isinstance(value, torch.SymInt):
                if (size := sizes.get(value.node.expr)) is None:
                    return None
                from_step.append(FromStep(place, *size))
            elif (which := self._which(value)) is not None:
                from_step.append(FromStep(place, which, None))
            else:
                given[place] = value
        return StepGraph(alone.inner, given, tuple(from_step), alone.layers, alone.graph)

    def _which(self, given: Any) -> int | None:
        return next((k for k, tensor in enumerate(self._step) if tensor is given), None)

    def _sizes(self, placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]) -> dict[Any, tuple[int, int]]:
        """Return, for each size that a graph is given, a tensor of the step and a dimension that have it."""
        found: dict[Any, tuple[int, int]] = {}
        for node, given in zip(placeholders, example_inputs, strict=True):
            which = None if isinstance(given, torch.SymInt) else self._which(given)
            if which is None:
                continue
            for dim, size in enumerate(node.meta["example_value"].shape):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (which, dim))
        return found
