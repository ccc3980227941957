"""The graph of a step of an engine, by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

# Relative errors of logits that arithmetic makes are below this.
ROUNDING = 0.2


class FromStep(NamedTuple):
    """An argument of a graph that each step brings. place: among the arguments. which: of the step's tensors; dim: a
    size of it is meant."""

    place: int
    which: int
    dim: int | None


class StepGraph(NamedTuple):
    """A step's graph. call: takes `given`, with what each step brings in its places, and `layers` behind it. graph:
    what it runs; None if that is compiled."""

    call: Callable[..., Any]
    given: list[Any]
    from_step: tuple[FromStep, ...]
    layers: Sequence[Any]
    graph: fx.Graph | None

    def forward(self) -> Callable[..., Tensor]:
        """Return what computes a step from its tensors."""
        call, given, from_step = self.call, [*self.given, *self.layers], self.from_step

        def forward(*step: Tensor) -> Tensor:
            now = given.copy()
            for place, which, dim in from_step:
                now[place] = step[which] if dim is None else step[which].shape[dim]
            (result,) = call(*now)
            return result  # type: ignore[no-any-return]

        return forward
