"""The tiny models cover every experts class of the installed transformers and are fit for comparisons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.moe_models import (
    MoeCase,
    NoCaseError,
    build,
    decorated_experts_classes,
    experts_modules,
    moe_case,
    run,
)
from torch import Tensor, fx

pytestmark = pytest.mark.slow

CLASSES = decorated_experts_classes()
NAMES = [class_name for _, class_name in CLASSES]


@pytest.fixture(scope="module", params=CLASSES, ids=NAMES)
def case(request: pytest.FixtureRequest) -> MoeCase:
    try:
        return moe_case(*request.param)
    except NoCaseError as error:
        pytest.fail(str(error), pytrace=False)


def test_the_library_has_experts_classes() -> None:
    assert len(CLASSES) >= 30
    assert len(set(NAMES)) == len(NAMES)


def test_weights_are_finite_and_depend_on_the_seed_alone(case: MoeCase) -> None:
    first, _ = build(case, seed=1)
    torch.manual_seed(2)
    again, _ = build(case, seed=1)
    for (name, x), (_, y) in zip(_named_tensors(first), _named_tensors(again), strict=True):
        assert x.isfinite().all(), name
        assert torch.equal(x, y), name


def test_grouped_mm_agrees_with_eager(case: MoeCase) -> None:
    model, kwargs = build(case)
    eager = _run_with(model, kwargs, "eager")
    assert eager.isfinite().all()
    assert _relative_error(_run_with(model, kwargs, "grouped_mm"), eager) < 1e-4


def test_runs_in_bfloat16(case: MoeCase) -> None:
    model, kwargs = build(case, torch.bfloat16)
    parts = experts_modules(model, case.experts_class).values()
    assert all(part.down_proj.dtype == torch.bfloat16 for part in parts)
    assert _run_with(model, kwargs, "grouped_mm").isfinite().all()


def test_the_experts_matter(case: MoeCase) -> None:
    model, kwargs = build(case)
    before = _run_with(model, kwargs, "grouped_mm")
    with torch.no_grad():
        for part in experts_modules(model, case.experts_class).values():
            part.down_proj.zero_()
    assert _relative_error(_run_with(model, kwargs, "grouped_mm"), before) > 0.03


def test_the_experts_are_a_region_of_the_graph(case: MoeCase) -> None:
    """The region takes hidden states, ids, weights and the module's parameters, and gives one tensor."""
    model, kwargs = build(case)
    model.set_experts_implementation("grouped_mm")
    graphs: list[fx.Graph] = []

    def record(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = run(model, kwargs)
        actual = run(torch.compile(model, backend=record, fullgraph=case.fullgraph, dynamic=False), kwargs)
    assert _relative_error(actual, expected) < 1e-4

    parameters = len(list(next(iter(experts_modules(model, case.experts_class).values())).parameters()))
    regions = [region for graph in graphs for region in _regions(graph, case.experts_class)]
    assert regions, f"no node of {len(graphs)} graphs names {case.name} in its nn_module_stack"
    for region in regions:
        inside = set(region)
        live_ins = {node for inner in region for node in inner.all_input_nodes} - inside
        live_outs = [node for node in region if not inside.issuperset(node.users)]
        assert len(live_outs) == 1
        assert len([node for node in live_ins if node.op == "placeholder"]) == parameters
        assert len([node for node in live_ins if node.op != "placeholder"]) == 3


def _named_tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _run_with(model: Any, kwargs: dict[str, Any], implementation: str) -> Tensor:
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        return run(model, kwargs)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _regions(graph: fx.Graph, experts_class: type[torch.nn.Module]) -> list[list[fx.Node]]:
    """Return the nodes traced inside each call of an experts module, in the order of the graph."""
    regions: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        for path, owner in node.meta.get("nn_module_stack", {}).values():
            if owner is experts_class:
                regions.setdefault(path, []).append(node)
    return list(regions.values())
