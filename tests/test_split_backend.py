"""The backend with experts on a stand-in device, on tiny models of the families that matter."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.moe_models import build, case_of
from helpers.two_sides import FAMILIES, greedy_logits, place
from ktcompile.passes import passes_for
from ktcompile.passes.overlap import overlap
from torch import fx, nn

import ktcompile
from ktcompile.config import CompileOptions
from ktcompile.graph import report
from ktcompile.graph.owners import ParameterOwners
from ktcompile.graph.report import CompileReport
from ktcompile.ops.experts import PackedExperts
from ktcompile.runtime.activity import Activity
from ktcompile.runtime.adaptive import AdaptivePlacement
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.split import SplitExperts

STAND_IN = {"inner": "eager", "device": "stand-in", "placement": "uniform"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    report.clear_compile_reports()
    yield
    torch._dynamo.reset()


def split_layers(graph_inputs: list[PackedExperts]) -> list[SplitExperts]:
    layers = [experts.split for experts in graph_inputs]
    assert all(isinstance(layer, SplitExperts) for layer in layers)
    return layers  # type: ignore[return-value]


@pytest.fixture
def packed(monkeypatch) -> list[PackedExperts]:
    """The layers that are put on a device, in the order of the model."""
    seen: list[PackedExperts] = []
    do_place = Placer.place

    def noted(self: Placer, layers: list[PackedExperts], top_k: list[int]) -> None:
        seen.extend(layers)
        do_place(self, layers, top_k)

    monkeypatch.setattr(Placer, "place", noted)
    return seen


def one_layer(family: str) -> tuple[Any, dict[str, Any]]:
    """Return a model and its inputs for what is no matter of how many layers there are."""
    return build(case_of(family), num_hidden_layers=1)


def logits(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_prefill_and_decode_equal_those_of_the_cpu(family, packed):
    """One compilation serves every placement, and prompts whose experts are sent to the device; with no expert on the
    device it is the CPU's model."""
    model, kwargs = build(case_of(family))
    options = {**STAND_IN, "device_expert_fraction": 0.5, "stream_from": 4}
    both = torch.compile(model, backend="kt", options=options, dynamic=True)
    logits(both, {**kwargs, "use_cache": True})  # as in `greedy_logits`, which has no other graph for the prompt
    layers = split_layers(packed)
    count = layers[0].experts.num_experts
    assert all(layer.streaming is not None and layer.activity.streamed_calls == 1 for layer in layers)
    streaming = [layer.streaming for layer in layers]
    for layer in layers:
        layer.streaming = None
    place(layers, 0)
    wanted = greedy_logits(both, kwargs)
    compiled = len(ktcompile.compile_reports())
    for resident in (1, count // 2, count - 1, count):
        place(layers, resident)
        assert relative_error(greedy_logits(both, kwargs), wanted) < 2e-6, f"{resident} of {count}"
    place(layers, count // 2)
    for layer, how in zip(layers, streaming, strict=True):
        layer.streaming, layer.activity = how, Activity()
    assert relative_error(greedy_logits(both, kwargs), wanted) < 2e-6, "streamed"
    # The prompt, and no step of decode.
    assert [(layer.activity.calls, layer.activity.streamed_calls) for layer in layers] == [(4, 1)] * len(layers)
    assert all(layer.activity.streamed_rows for layer in layers)
    assert len(packed) == len(layers)  # the graphs that were compiled later left experts where they were
    assert len(ktcompile.compile_reports()) == compiled


def test_nothing_is_compiled_again_when_experts_move(packed):
    model, kwargs = one_layer("qwen3_moe")
    wanted = logits(model, kwargs)
    both = torch.compile(model, backend="kt", fullgraph=True, options={**STAND_IN, "inner": "inductor"})
    assert relative_error(logits(both, kwargs), wanted) < 1e-5
    layers, chance = split_layers(packed), random.Random(0)
    for _ in range(12):
        for layer in layers:
            move(layer, chance)
        assert relative_error(logits(both, kwargs), wanted) < 1e-5
    assert len(ktcompile.compile_reports()) == 1
    assert sum(layer.activity.bytes_moved for layer in layers) > 0


def move(layer: SplitExperts, chance: random.Random) -> None:
    """Begin a move or two; what has been copied is switched at the next call."""
    settled = layer.resident - layer.moving
    if settled and chance.random() < 0.7:
        layer.demote(chance.choice(sorted(settled)))
    outside = sorted(set(range(layer.experts.num_experts)) - layer.resident - layer.moving)
    if outside:
        layer.promote(chance.choice(outside))
    if chance.random() < 0.5:
        layer.settle()


def test_taken_weights_come_back_from_the_device(packed):
    model, kwargs = one_layer("mixtral")
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    both = torch.compile(model, backend="kt", options={**STAND_IN, "weights": "take"})
    logits(both, kwargs)
    assert any(layer.resident for layer in split_layers(packed))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name]), name


def test_the_last_compilation_says_where_experts_are(packed):
    model, kwargs = one_layer("qwen3_moe")
    first = torch.compile(model, backend="kt", options={**STAND_IN, "device_expert_fraction": 1.0})
    logits(first, kwargs)
    torch._dynamo.reset()
    second = torch.compile(model, backend="kt", options={**STAND_IN, "device_expert_fraction": 0.0})
    wanted = logits(second, kwargs)
    assert not any(layer.resident for layer in split_layers(packed))
    # A graph without a device runs layers that are split all the same.
    torch._dynamo.reset()
    alone = torch.compile(model, backend="kt", options={"inner": "eager"})
    assert torch.equal(logits(alone, kwargs), wanted)


def test_what_is_submitted_early_is_waited_for_late():
    graph = fx.Graph()
    x, ids, weights, handle, shared = (graph.placeholder(n) for n in ("x", "ids", "weights", "handle", "shared"))
    other = graph.call_function(torch.sin, (shared,))
    ticket = graph.call_function(torch.ops.kt.moe_submit.default, (x, ids, weights, handle))
    resident = graph.call_function(torch.ops.kt.moe_resident.default, (x, weights, ticket))
    total = graph.call_function(torch.ops.kt.moe_wait.default, (x, resident, ticket))
    later = graph.call_function(torch.cos, (other,))
    graph.output(graph.call_function(torch.add, (total, later)))
    gm = fx.GraphModule(nn.Module(), graph)
    assert overlap(gm, (), CompileReport("eager")) == 2
    gm.graph.lint()
    order = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert order[:1] == [ticket] and order[-2] is total
    assert order.index(later) < order.index(total) and order.index(other) > order.index(ticket)
    assert overlap(gm, (), CompileReport("eager")) == 0


def test_experts_follow_the_routers_while_a_model_runs(packed, monkeypatch):
    model, kwargs = one_layer("qwen3_moe")
    wanted = logits(model, kwargs)
    monkeypatch.setattr(AdaptivePlacement, "step", counted := Counted(AdaptivePlacement.step))
    both = torch.compile(model, backend="kt", fullgraph=True, options={**STAND_IN, "placement": "adaptive"})
    for _ in range(4):
        assert relative_error(logits(both, kwargs), wanted) < 1e-5
    assert counted.calls == 4 and len(ktcompile.compile_reports()) == 1


class Counted:
    """A method that counts its calls."""

    def __init__(self, method: Callable[[Any], None]) -> None:
        self._method, self.calls = method, 0

    def __get__(self, instance: Any, owner: type) -> Callable[[], None]:
        def call() -> None:
            self.calls += 1
            self._method(instance)

        return call


def test_split_graphs_only_where_there_is_a_device():
    names = [p.name for p in passes_for(CompileOptions(), ParameterOwners())]
    fused = ["fuse_moe", "fuse_norm", "fuse_add_norm", "fuse_rotary", "fuse_attention"]
    assert names == [*fused, "pack_moe", "pack_linear", "pack_latents"]
    with_device = [p.name for p in passes_for(CompileOptions(device="stand-in"), ParameterOwners())]
    assert with_device == [*names, "split_experts", "overlap"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be one of none, stand-in"),
        ({"device_expert_fraction": 1.5}, "device_expert_fraction is 1.5"),
        ({"device_memory": -1}, "device_memory is -1"),
        ({"placement": "best"}, "placement is 'best'; it must be one of adaptive"),
        ({"placement": "frequency"}, "needs a routing_profile"),
    ],
)
def test_bad_options_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        CompileOptions(**options)
