"""How long the experts of a layer take, split between CPU and device: for estimates, simulations and policies alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Hardware, Processor

Floats = NDArray[np.float64]

# How the cold experts of a call are run: on the CPU, copied to the device for this call, or the faster of both.
Way = Literal["cheaper", "split", "streamed"]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the experts of a layer have to do in a call: numbers, or arrays over many calls of one shape.

    cold, hot: experts with tokens, in the CPU's memory and on the device. They may be means, of which a part of one is
    the chance that there is any. cpu: the CPU's seconds for the cold ones. device: the device's for the hot ones.
    all_device: the device's for all. last: the device's for the expert that is copied last. copy: the link's seconds
    for the weights of the cold ones. Nothing that a call costs beside its work is in these.
    """

    cold: Any
    hot: Any
    cpu: Any
    device: Any
    all_device: Any
    last: Any
    copy: Any


@dataclass(frozen=True, slots=True, eq=False)
class LayerCost:
    """Seconds of a layer's experts, in the shape of the work. cpu, device: busy. copy: weights on the link.
    total: until the sum is there. streamed: whether cold experts went to the device and not to the CPU."""

    cpu: Floats
    device: Floats
    copy: Floats
    total: Floats
    streamed: NDArray[np.bool_]


def layer_cost(hardware: Hardware, work: Work, way: Way = "cheaper") -> LayerCost:
    """Return what a layer's experts take. CPU and device work side by side; streamed weights go through two buffers, so
    that copies run beside the device's products, and the last expert's products begin when its copy ends."""
    none = np.zeros_like(np.asarray(work.cpu, dtype=np.float64))
    times = _Times(hardware, work)
    if way == "split" or hardware.link is None:
        return LayerCost(times.cpu + none, times.device + none, none, times.split + none, none > 0)
    streamed = np.asarray((work.cold > 0) & ((way == "streamed") | (times.streaming < times.split)))
    return LayerCost(
        cpu=np.where(streamed, 0.0, times.cpu),
        device=np.where(streamed, times.everything, times.device),
        copy=np.where(streamed, times.copy, 0.0),
        total=np.where(streamed, times.streaming, times.split),
        streamed=streamed,
    )


def layer_seconds(hardware: Hardware, work: Work) -> Floats:
    """Return the `total` of `layer_cost` by the cheaper way, on a machine with a device."""
    times = _Times(hardware, work)
    seconds: Floats = np.minimum(times.split, times.streaming)
    return seconds


class _Times:
    """The seconds of both ways. cpu, device, split: with cold experts on the CPU. everything, copy, streaming: with all
    on the device, where there is one."""

    def __init__(self, hardware: Hardware, work: Work) -> None:
        any_cold = np.minimum(work.cold, 1.0)  # the chance of it, of a mean
        self.cpu: Any = work.cpu + any_cold * hardware.cpu.overhead
        self.device: Any = 0.0
        self.split: Any = self.cpu
        if hardware.device is None or hardware.link is None:
            assert not np.any(work.hot), "no device has experts"
            return
        self.device = work.device + np.minimum(work.hot, 1.0) * hardware.device.overhead
        self.split = np.maximum(self.cpu, self.device)
        self.everything = work.all_device + np.minimum(work.cold + work.hot, 1.0) * hardware.device.overhead
        self.copy = work.copy + any_cold * hardware.link.latency
        self.streaming = np.maximum(self.everything, self.copy + any_cold * work.last)


def uniform_layer(hardware: Hardware, layer: MoeLayerFacts, tokens: float, resident: int) -> LayerCost:
    """Return the cost of a layer with `resident` experts on the device, if `tokens` tokens choose experts at random."""
    distinct = distinct_experts(layer, tokens)
    rows = tokens * layer.top_k / distinct
    hot, cold = (distinct * n / layer.num_experts for n in (resident, layer.num_experts - resident))
    on_device, copy = 0.0, 0.0
    if hardware.device is not None and hardware.link is not None:
        on_device = _one(hardware.device, layer, rows)
        copy = cold * layer.expert_bytes / hardware.link.bandwidth
    work = Work(
        cold=cold,
        hot=hot,
        cpu=cold * _one(hardware.cpu, layer, rows),
        device=hot * on_device,
        all_device=distinct * on_device,
        last=on_device,
        copy=copy,
    )
    return layer_cost(hardware, work)


def distinct_experts(layer: MoeLayerFacts, tokens: float) -> float:
    """Return how many experts `tokens` tokens touch on average, if they choose at random."""
    return float(layer.num_experts * (1 - (1 - layer.top_k / layer.num_experts) ** tokens))


def _one(processor: Processor, layer: MoeLayerFacts, rows: float) -> float:
    return processor.seconds(layer.expert_bytes, rows * layer.flops_per_row)
