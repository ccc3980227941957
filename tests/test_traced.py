"""Steps of an engine without what Dynamo does around a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ktcompile.engine.traced import TracedStep

WIDTH = 64


def traced(step: Tensor, layer: torch.nn.Module) -> tuple[TracedStep, Callable[..., Tensor]]:
    """Return what has traced a function of `step`, and the function, compiled."""
    keeper = TracedStep((step,))

    def function(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y.view(x.shape[0], 4, -1) + x.shape[0]

    compiled = torch.compile(function, backend=keeper, dynamic=True, fullgraph=True)
    with torch.no_grad():
        compiled(step)
    return keeper, compiled


def test_a_graph_is_called_with_what_is_new_in_a_step() -> None:
    layer = torch.nn.Linear(WIDTH, 512, bias=False)
    keeper, compiled = traced(torch.randn(5, WIDTH), layer)
    graph = keeper.graph()
    assert graph is not None
    alone = graph.forward()
    with torch.no_grad():
        for rows in (2, 5, 33):
            x = torch.randn(rows, WIDTH)
            assert torch.equal(alone(x), compiled(x))
            assert torch.allclose(alone(x), layer(x).view(rows, 4, -1) + rows, atol=1e-5)


def test_what_has_two_graphs_is_left_to_dynamo() -> None:
    keeper, compiled = traced(torch.randn(5, WIDTH), torch.nn.Linear(WIDTH, 512, bias=False))
    with torch.no_grad():
        torch.compiler.reset()
        compiled(torch.randn(7, WIDTH))
    assert keeper.graph() is None


def test_so_is_a_graph_without_packed_layers() -> None:
    keeper, _ = traced(torch.randn(5, WIDTH), torch.nn.Identity())
    assert keeper.graph() is None
