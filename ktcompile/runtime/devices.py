"""The devices of this process, and which experts they are given at first."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ktcompile.log import logger
from ktcompile.ops.experts import PackedExperts
from ktcompile.plan.facts import ModelFacts, MoeLayerFacts
from ktcompile.plan.hardware import Hardware, preset
from ktcompile.plan.placement import budget_of, place
from ktcompile.plan.profile import RoutingProfile
from ktcompile.plan.replan import ReplanConfig
from ktcompile.runtime.adaptive import AdaptivePlacement
from ktcompile.runtime.device import Device
from ktcompile.runtime.split import SplitExperts
from ktcompile.runtime.stand_in import StandInDevice, WallClock

# More than any experts take.
_UNLIMITED = 1 << 60
# What the stand-in stands for.
_HARDWARE = preset("4090-ddr5")


@functools.cache
def device_for(kind: str, memory_bytes: int | None) -> Device:
    """Return the device of a kind and a budget, which all graphs share. ValueError: there is no such kind."""
    if kind != "stand-in":
        raise ValueError(f"device {kind!r} is unknown; there is stand-in")
    assert _HARDWARE.link is not None
    return StandInDevice(_UNLIMITED if memory_bytes is None else memory_bytes, _HARDWARE.link, WallClock())


class Placer:
    """Puts a part of a model's experts on a device, and keeps moving them where `strategy` is adaptive.

    fraction: of all experts' bytes. profile: needed by strategies that are told what routers choose. hardware: whose
    times decide what is worth a move.
    """

    def __init__(
        self,
        device: Device,
        fraction: float,
        strategy: str = "uniform",
        profile: RoutingProfile | None = None,
        *,
        keep_cpu_copy: bool = False,
        config: ReplanConfig | None = None,
        hardware: Hardware = _HARDWARE,
    ) -> None:
        self._device, self._fraction, self._strategy, self._profile = device, fraction, strategy, profile
        self._keep_cpu_copy, self._config, self._hardware = keep_cpu_copy, config, hardware

    def ensure(self, layers: Sequence[PackedExperts], top_k: Sequence[int]) -> None:
        """Split the layers of a model, unless they are split, in whatever way."""
        if any(experts.split is None for experts in layers):
            self.place(layers, top_k)

    def place(self, layers: Sequence[PackedExperts], top_k: Sequence[int]) -> None:
        """Split the layers of a model, anew if they are split. Where the budget ends, experts stay with the CPU."""
        for experts in layers:
            if isinstance(experts.split, SplitExperts):
                experts.split.dissolve()
        facts = _facts(layers, top_k)
        wanted = budget_of(facts, self._fraction)
        budget = min(wanted, self._device.memory_bytes - self._device.used_bytes)
        if budget < wanted:
            logger.warning(
                "%d of the %d bytes that experts should have on the %s device are left; the others stay with the CPU",
                budget,
                wanted,
                self._device.name,
            )
        plan = place(self._strategy, facts, self._hardware, budget, self._profile)
        split = [SplitExperts(experts, self._device, keep_cpu_copy=self._keep_cpu_copy) for experts in layers]
        for experts, layer, resident in zip(layers, split, plan.resident, strict=True):
            experts.split = layer
            for expert in resident:
                layer.promote(expert)
            layer.settle()
        if self._strategy == "adaptive":
            split[0].adaptive = AdaptivePlacement(split, facts, self._hardware, budget, self._config, self._profile)

    def step(self, layers: Sequence[PackedExperts]) -> None:
        """Take note of a call of all layers, after which experts may move."""
        first = layers[0].split
        if isinstance(first, SplitExperts) and first.adaptive is not None:
            first.adaptive.step()


def _facts(layers: Sequence[PackedExperts], top_k: Sequence[int]) -> ModelFacts:
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
