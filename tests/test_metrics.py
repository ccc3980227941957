"""What is told of experts on a device: numbers, JSON, a line, Prometheus' text and a chart."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
from helpers.layers import EXPERTS, TOP_K, random_inputs, random_layer
from helpers.text_model import build_model
from matplotlib.figure import Figure

import ktcompile
from ktcompile.bench import experts_plot
from ktcompile.models import hf_experts
from ktcompile.models.placed import attach
from ktcompile.ops import moe
from ktcompile.plan.hardware import Link
from ktcompile.runtime.activity import Activity
from ktcompile.runtime.devices import Placer, device_for
from ktcompile.runtime.metrics import ExpertMetrics, LayerMetrics, metrics_of
from ktcompile.runtime.prometheus import exposition
from ktcompile.runtime.stand_in import StandInDevice, VirtualClock

TOKENS = 6


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def split():
    """Two layers, two of five experts of each on the device, and the device."""
    layers = [random_layer(seed=seed).pack() for seed in range(2)]
    device = StandInDevice(1 << 30, Link(bandwidth=1e12, latency=0.0), VirtualClock())
    Placer(device, 0.4, "uniform", stream_from=0).place(layers, [TOP_K] * 2)
    return layers, device


def call(layers, tokens=TOKENS, seed=1):
    """Call both layers, and return how many rows each expert had."""
    x, ids, weights = random_inputs(tokens, seed=seed)
    for layer in layers:
        moe(x, ids, weights, layer)
    return np.bincount(ids.flatten(), minlength=EXPERTS)


def test_a_snapshot_has_what_was_counted(split):
    layers, device = split
    rows = call(layers)
    found = metrics_of(layers)
    size = layers[0].native.expert_nbytes
    assert (found.device, found.swaps, found.device_memory_bytes) == (device.name, 0, 1 << 30)
    assert found.device_used_bytes == 4 * size == found.total("bytes_promoted")
    for layer in found.layers:
        assert layer.resident == (0, 1) and layer.chosen == tuple(rows)
        assert layer.activity.hit_rate == rows[:2].sum() / rows.sum()
        assert (layer.activity.device_rows, layer.activity.cpu_rows) == (rows[:2].sum(), rows[2:].sum())
    assert found.hit_rate == rows[:2].sum() / rows.sum()


def test_a_snapshot_does_not_change(split):
    layers, _ = split
    call(layers)
    found = metrics_of(layers)
    before = found.as_dict()
    call(layers)
    layers[0].split.demote(0)
    layers[0].split.settle()
    assert found.as_dict() == before
    after = metrics_of(layers)
    assert after.layers[0].resident == (1,) and after.layers[0].activity.demoted == 1
    assert after.layers[1].activity.calls == 2


def test_without_tokens_there_is_no_rate(split):
    layers, _ = split
    found = metrics_of(layers)
    assert found.hit_rate is None
    assert found.as_dict()["layers"][0]["hit_rate"] is None
    assert not re.search(r"hit_rate\{", exposition(found))
    assert "4 of 10 on the stand-in device | 0% of their tokens there" in found.summary()


def test_layers_that_are_not_split_have_no_metrics():
    with pytest.raises(ValueError, match="no layer has experts on a device"):
        metrics_of([random_layer().pack()])


def test_the_dictionary_is_json(split):
    layers, _ = split
    call(layers)
    found = metrics_of(layers)
    again = json.loads(json.dumps(found.as_dict()))
    assert again == found.as_dict()
    names = {f.name for f in dataclasses.fields(Activity)}
    assert again["layers"][0].keys() == names | {"resident", "chosen", "hit_rate"}
    assert again["hit_rate"] == found.hit_rate and len(again["layers"]) == 2


def sample(**activity) -> ExpertMetrics:
    layer = LayerMetrics((1, 2), (5, 3, 0, 2), Activity(**activity))
    return ExpertMetrics('a "device"\\', 1000, 600, 7, (layer, dataclasses.replace(layer, resident=())))


def parsed(text: str) -> dict[str, float]:
    """Return the samples of Prometheus' text, each line of which must be one, or about one."""
    samples, described = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        comment = re.fullmatch(r"# (HELP|TYPE) (\w+) (.+)", line)
        if comment:
            described.setdefault(comment[2], {})[comment[1]] = comment[3]
            continue
        match = re.fullmatch(r"(\w+)((?:\{(?:\w+=\"(?:[^\"\\]|\\.)*\",?)+\})?) (\S+)", line)
        assert match, line
        name, labels, value = match.groups()
        assert described[name].keys() == {"HELP", "TYPE"}
        assert described[name]["TYPE"] == ("counter" if name.endswith("_total") else "gauge")
        assert name + labels not in samples
        samples[name + labels] = float(value)
    return samples


def test_prometheus_reads_every_sample():
    found = parsed(exposition(sample(cpu_rows=6, device_rows=3, streamed_rows=1, bytes_streamed=128, cpu_seconds=0.25)))
    assert found['ktcompile_expert_hit_rate{layer="1"}'] == 0.3
    assert found['ktcompile_expert_resident{layer="0"}'] == 2
    assert found['ktcompile_expert_rows_total{layer="0",side="cpu"}'] == 6
    assert found['ktcompile_expert_rows_total{layer="1",side="streamed"}'] == 1
    assert found["ktcompile_expert_swaps_total"] == 7
    assert found['ktcompile_expert_moved_bytes_total{kind="streamed"}'] == 256
    assert found['ktcompile_expert_busy_seconds_total{side="cpu"}'] == 0.5
    assert found['ktcompile_expert_device_used_bytes{device="a \\"device\\"\\\\"}'] == 600


def test_counters_of_prometheus_never_fall(split):
    layers, _ = split
    before: dict[str, float] = {}
    for seed in range(3):
        call(layers, seed=seed)
        found = parsed(exposition(metrics_of(layers)))
        assert all(found[name] >= value for name, value in before.items() if "_total" in name)
        before = found
    assert before['ktcompile_expert_calls_total{layer="0"}'] == 3


def test_the_chart_shows_layers_experts_and_rates(split, monkeypatch):
    layers, _ = split
    rows = call(layers)
    drawn = []
    save = Figure.savefig

    def noted(self, *arguments, **others):
        drawn.append(self)
        save(self, *arguments, **others)

    monkeypatch.setattr(Figure, "savefig", noted)
    file = io.BytesIO()
    experts_plot.draw(metrics_of(layers), "a test", file)
    assert file.getvalue().startswith(b"\x89PNG")
    heat, rates = drawn[0].axes[:2]
    assert np.allclose(heat.images[0].get_array(), np.stack([rows, rows]) / rows.sum())
    assert heat.collections[0].get_offsets().tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert [bar.get_width() for bar in rates.patches] == [rows[:2].sum() / rows.sum()] * 2
    assert "a test" in drawn[0].get_suptitle()


def test_the_chart_of_unequal_layers_without_residents():
    layers = tuple(LayerMetrics((), (1,) * count, Activity()) for count in (2, 4))
    file = io.BytesIO()
    experts_plot.draw(ExpertMetrics("none", 0, 0, 0, layers), "none", file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_the_metrics_of_a_model_without_a_compiler():
    model = build_model()
    model.set_experts_implementation("kt")
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM has no experts on a device: name one when"):
        ktcompile.expert_metrics(model)
    attach(model, Placer(device_for("stand-in", None), 0.4, "uniform"))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    found = ktcompile.expert_metrics(model)
    assert [layer.activity.calls for layer in found.layers] == [1, 1]
    assert [layer.resident for layer in found.layers] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("weights", ["copy", "take"])
def test_the_metrics_of_a_compiled_model(weights):
    model = build_model()
    options = {"inner": "eager", "device": "stand-in", "weights": weights, "weight_format": "bf16", "isa": "scalar"}
    compiled = torch.compile(model, backend="kt", options=options)
    with torch.no_grad():
        compiled(torch.tensor([[1, 2, 3]]))
    for each in (model, compiled):
        found = ktcompile.expert_metrics(each)
        assert [sum(layer.chosen) for layer in found.layers] == [6, 6]
    assert hf_experts.shape(model) == (2, 5)
