"""Metrics in the text format that Prometheus reads (text/plain; version=0.0.4)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator

from ktcompile.runtime.metrics import ExpertMetrics, LayerMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "ktcompile_expert_"
_SIDES = ("cpu", "device", "streamed")


def exposition(metrics: ExpertMetrics) -> str:
    """Return all samples, each metric with its help and its type."""
    lines: list[str] = []
    for name, kind, text, samples in families(metrics):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {value:.17g}" for labels, value in samples]
    return "\n".join(lines) + "\n"


_Sample = tuple[dict[str, str], float]


def families(metrics: ExpertMetrics) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    """Yield name, type, help and samples of each metric; a sample is its labels and its value."""
    for name, kind, text, samples in _metrics(metrics):
        yield _PREFIX + name, kind, text, samples


def _metrics(m: ExpertMetrics) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    known = [(i, layer.activity.hit_rate) for i, layer in enumerate(m.layers)]
    rates = [({"layer": str(i)}, rate) for i, rate in known if rate is not None]
    yield "hit_rate", "gauge", "Part of the tokens of experts whose expert was on the device.", rates
    yield "resident", "gauge", "Experts on the device.", _of_layers(m, lambda layer: len(layer.resident))
    device = {"device": m.device}
    yield "device_memory_bytes", "gauge", "Memory that the device may use.", [(device, m.device_memory_bytes)]
    yield "device_used_bytes", "gauge", "Memory that the device uses.", [(device, m.device_used_bytes)]
    yield "swaps_total", "counter", "Experts moved to the device after the first placement.", [({}, m.swaps)]
    rows = [_of_layers(m, operator.attrgetter(f"activity.{side}_rows"), side=side) for side in _SIDES]
    text = "Pairs of a token and an expert, by where they were computed."
    yield "rows_total", "counter", text, list(itertools.chain(*rows))
    yield "calls_total", "counter", "Calls of a layer.", _of_layers(m, lambda layer: layer.activity.calls)
    text = "Calls that copied experts of the CPU through the device."
    yield "streamed_calls_total", "counter", text, _of_layers(m, lambda layer: layer.activity.streamed_calls)
    kinds = ("promoted", "demoted", "streamed")
    moved = [({"kind": k}, m.total(f"bytes_{k}")) for k in kinds]
    yield "moved_bytes_total", "counter", "Bytes of weights copied between CPU and device.", moved
    ended = [({"kind": k}, m.total(k)) for k in ("promoted", "demoted", "failed")]
    yield "moves_total", "counter", "Moves of experts that ended, the first placement included.", ended
    busy = [({"side": s}, m.total(f"{s}_seconds")) for s in ("cpu", "device")]
    yield "busy_seconds_total", "counter", "Time in which a side computed experts, in calls whose time is known.", busy
    both: list[_Sample] = [({}, m.total("overlap_seconds"))]
    yield "overlap_seconds_total", "counter", "Time in which both sides computed experts.", both


def _of_layers(metrics: ExpertMetrics, value: Callable[[LayerMetrics], float], **labels: str) -> list[_Sample]:
    return [({"layer": str(i), **labels}, value(layer)) for i, layer in enumerate(metrics.layers)]


def _labels(labels: dict[str, str]) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
