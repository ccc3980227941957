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
from torch import Tensor

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


def _named_tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _run_with(model: Any, kwargs: dict[str, Any], implementation: str) -> Tensor:
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        return run(model, kwargs)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
