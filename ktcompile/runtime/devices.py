"""The devices of this process, and which experts they are given at first."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ktcompile.log import logger
from ktcompile.ops.experts import PackedExperts
from ktcompile.plan.facts import ModelFacts, MoeLayerFacts
from ktcompile.plan.hardware import Hardware, preset
from ktcompile.plan.placement import budget_of, place
from ktcompile.plan.profile import RoutingProfile
from ktcompile.plan.replan import ReplanConfig
from ktcompile.plan.streaming import streaming_threshold
from ktcompile.runtime.adaptive import MOST_DECODED, AdaptivePlacement
from ktcompile.runtime.calibrate import measured_cpu
from ktcompile.runtime.cuda_support import cuda_device
from ktcompile.runtime.device import Device, DeviceMemoryError
from ktcompile.runtime.split import SplitExperts
from ktcompile.runtime.stand_in import StandInDevice, WallClock
from ktcompile.runtime.streaming import Streaming

# More than any experts take.
_UNLIMITED = 1 << 60
# What the stand-in stands for.
_HARDWARE = preset("4090-ddr5")
# Copies of this size reach the link's speed; more would only take memory from experts that stay.
_BUFFER_BYTES = 64 << 20
# Of the device's memory, for the two buffers.
_MOST_BUFFERED = 0.25


@functools.cache
def device_for(kind: str, memory_bytes: int | None) -> Device:
    """Return the device of a kind and a budget, which all graphs share. ValueError: there is none of this kind."""
    if kind == "cuda":
        return cuda_device(memory_bytes)
    if kind != "stand-in":
        raise ValueError(f"device {kind!r} is unknown; there are cuda and stand-in")
    assert _HARDWARE.link is not None
    return StandInDevice(_UNLIMITED if memory_bytes is None else memory_bytes, _HARDWARE.link, WallClock())


class Placer:
    """Puts a part of a model's experts on a device, and keeps moving them where `strategy` is adaptive.

    fraction: of all experts' bytes. profile: needed by strategies that are told what routers choose. stream_from: calls
    of so many tokens copy the CPU's experts through the device; None: from where that is faster; 0: none does.
    hardware: whose times decide that, and what is worth a move; None: the device's, and this CPU's, which is measured.
    key: placers of the same one would do the same; None: of no other placer.
    """

    def __init__(
        self,
        device: Device,
        fraction: float,
        strategy: str = "uniform",
        profile: RoutingProfile | None = None,
        *,
        keep_cpu_copy: bool = False,
        stream_from: int | None = None,
        config: ReplanConfig | None = None,
        hardware: Hardware | None = None,
        key: object = None,
    ) -> None:
        self._device, self._fraction, self._strategy, self._profile = device, fraction, strategy, profile
        self._keep_cpu_copy, self._stream_from = keep_cpu_copy, stream_from
        self._config, self._hardware = config, hardware
        self._key = object() if key is None else key

    @property
    def where(self) -> torch.device:
        """Where the tensors of a call are."""
        return self._device.where()

    def ensure(self, layers: Sequence[PackedExperts], top_k: Sequence[int]) -> None:
        """Split the layers of a model, unless they are split, in whatever way."""
        if any(experts.split is None for experts in layers):
            self.place(layers, top_k)

    def keep(self, layers: Sequence[PackedExperts], top_k: Sequence[int]) -> None:
        """Split the layers of a model, unless such a placer did: another graph of the model was compiled."""
        split = [experts.split for experts in layers]
        if not all(isinstance(layer, SplitExperts) and layer.placed_by == self._key for layer in split):
            self.place(layers, top_k)

    def place(self, layers: Sequence[PackedExperts], top_k: Sequence[int]) -> None:
        """Split the layers of a model, anew if they are split. Where the budget ends, experts stay with the CPU."""
        for experts in layers:
            if isinstance(experts.split, SplitExperts):
                experts.split.dissolve()
        facts = facts_of(layers, top_k)
        free = self._device.memory_bytes - self._device.used_bytes
        buffered = self._buffered(facts, free)
        wanted = budget_of(facts, self._fraction)
        budget = min(wanted, free - buffered)
        if budget < wanted:
            logger.warning(
                "%d of the %d bytes that experts should have on the %s device are left; the others stay with the CPU",
                budget,
                wanted,
                self._device.name,
            )
        self._device.set_aside(layers, budget + buffered)
        hardware = self._hardware or self._measured(layers[0], facts.layers[0])
        plan = place(self._strategy, facts, hardware, budget, self._profile)
        split = []
        for experts, layer, resident in zip(layers, facts.layers, plan.resident, strict=True):
            streaming = self._streaming(hardware, layer, len(resident), buffered)
            split.append(SplitExperts(experts, self._device, keep_cpu_copy=self._keep_cpu_copy, streaming=streaming))
            experts.split = split[-1]
            split[-1].placed_by = self._key
            for expert in resident:
                try:
                    split[-1].promote(expert)
                except DeviceMemoryError as error:  # it had less than it was thought to have
                    logger.warning("%s: experts stay with the CPU, expert %d first: %s", experts.label, expert, error)
                    break
            split[-1].settle()
        if self._strategy == "adaptive":
            split[0].adaptive = AdaptivePlacement(split, facts, hardware, budget, self._config, self._profile)

    def step(self, layers: Sequence[PackedExperts]) -> None:
        """Take note of a call of all layers, after which experts may move."""
        first = layers[0].split
        if isinstance(first, SplitExperts) and first.adaptive is not None:
            first.adaptive.step()

    def _measured(self, like: PackedExperts, facts: MoeLayerFacts) -> Hardware:
        device, link = self._device.hardware(like, facts)
        return Hardware("this machine", measured_cpu(like, facts), device, link)

    def _buffered(self, facts: ModelFacts, free: int) -> int:
        """Return how many bytes the two buffers have, 0 where nothing is streamed or memory is short."""
        if self._stream_from == 0 or self._fraction == 1:
            return 0
        least = 2 * max(layer.expert_bytes for layer in facts.layers)
        size = min(max(least, 2 * _BUFFER_BYTES), int(free * _MOST_BUFFERED))
        return size if size >= least else 0

    def _streaming(self, hardware: Hardware, layer: MoeLayerFacts, resident: int, buffered: int) -> Streaming | None:
        experts = buffered // (2 * layer.expert_bytes)
        from_tokens = self._stream_from
        if from_tokens is None:
            found = streaming_threshold(hardware, layer, resident)
            # What is measured of experts that are small is not sure enough to stream them at each step of decode.
            from_tokens = found and max(found, MOST_DECODED + 1)
        return Streaming(from_tokens, experts) if experts and from_tokens else None


def facts_of(layers: Sequence[PackedExperts], top_k: Sequence[int]) -> ModelFacts:
    """Return what placement must know of a model's packed layers."""
    return ModelFacts(
        tuple(
            MoeLayerFacts(
                e.num_experts,
                min(k, e.num_experts),
                e.hidden_size,
                e.intermediate_size,
                e.native.expert_nbytes,
                e.spec.activation.gated,
            )
            for e, k in zip(layers, top_k, strict=True)
        )
    )
