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
from ktcompile.runtime.executable import Executable


class TracedStep:
    """A backend of `torch.compile` that keeps the graph of a function of tensors.

    steps: the tensors of the call that is traced, the function's arguments; all else that the graph is given stays.
    """

    def __init__(self, step: Sequence[Tensor]) -> None:
        self._step = step
        self._graphs = 0
        self._call: Callable[..., Any] | None = None
        self._given: list[Any] = []
        self._from_step: list[tuple[int, int, int | None]] = []  # place, which tensor, which of its sizes

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        compiled = kt(gm, example_inputs, **options)
        self._graphs += 1
        if not isinstance(compiled, Executable):
            return compiled
        self._call, kept = compiled.with_layers_of(example_inputs)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        sizes = self._sizes(placeholders, example_inputs)
        for place, i in enumerate(kept):
            given = example_inputs[i]
            self._given.append(None)
            if not placeholders[i].users:  # as where tensors begin in their memory
                continue
            if isinstance(given, torch.SymInt):
                if (size := sizes.get(given.node.expr)) is None:
                    self._call = None
                    break
                self._from_step.append((place, *size))
            elif (which := self._which(given)) is not None:
                self._from_step.append((place, which, None))
            else:
                self._given[place] = given
        return compiled

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

    def forward(self) -> Callable[..., Tensor] | None:
        """Return what computes a step by the one graph that there is, or None if it cannot be called by itself."""
        call, given, from_step = self._call, self._given, tuple(self._from_step)
        if call is None or self._graphs != 1:
            return None

        def forward(*step: Tensor) -> Tensor:
            now = given.copy()
            for place, which, dim in from_step:
                now[place] = step[which] if dim is None else step[which].shape[dim]
            (result,) = call(*now)
            return result  # type: ignore[no-any-return]

        return forward
