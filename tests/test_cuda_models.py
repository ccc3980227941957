"""The backend with experts on a GPU, on tiny models of the families that matter. Needs a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.moe_models import build, case_of
from helpers.two_sides import FAMILIES, greedy_logits, place
from torch import nn

import ktcompile
from ktcompile.graph import report
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.split import SplitExperts

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    report.clear_compile_reports()
    yield
    torch._dynamo.reset()


def on_both_sides(model: nn.Module) -> nn.Module:
    """Move all but the experts to the GPU."""
    model.set_experts_implementation("kt")
    for module in model.modules():
        if hasattr(module, "has_gate"):  # set by transformers' decorator of experts classes
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.cuda()
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.cuda()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_cpu(family, inner, monkeypatch):
    layers: list[SplitExperts] = []
    do_place = Placer.place

    def noted(self: Placer, packed: list[Any], top_k: list[int]) -> None:
        do_place(self, packed, top_k)
        layers.extend(experts.split for experts in packed)

    monkeypatch.setattr(Placer, "place", noted)
    model, kwargs = build(case_of(family))
    wanted = greedy_logits(model, kwargs)
    on_both_sides(model)
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    options = {"inner": inner, "device": "cuda", "placement": "uniform", "device_expert_fraction": 1.0}
    both = torch.compile(model, backend="kt", options=options, dynamic=True)
    assert relative_error(greedy_logits(both, inputs), wanted) < 1e-4
    compiled, count = len(ktcompile.compile_reports()), layers[0].experts.num_experts
    for resident in (0, 1, count // 2, count):
        place(layers, resident)
        assert relative_error(greedy_logits(both, inputs), wanted) < 1e-4, f"{resident} of {count}"
    assert len(ktcompile.compile_reports()) == compiled
