"""Where the experts of a model are and what its layers did, as numbers that do not change any more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ktcompile.ops.experts import PackedExperts
from ktcompile.runtime.activity import Activity
from ktcompile.runtime.split import SplitExperts


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """One layer since it was split.

    resident: the experts that are on the device. chosen: how many tokens each expert was given, in either place.
    activity: what the layer did, which no longer changes.
    """

    resident: tuple[int, ...]
    chosen: tuple[int, ...]
    activity: Activity

    @property
    def num_experts(self) -> int:
        return len(self.chosen)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON has."""
        return {
            "resident": list(self.resident),
            "chosen": list(self.chosen),
            "hit_rate": self.activity.hit_rate,
            **asdict(self.activity),
        }


@dataclass(frozen=True, slots=True)
class ExpertMetrics:
    """The layers of a model with a device. swaps: experts that were moved to it after the first placement."""

    device: str
    device_memory_bytes: int
    device_used_bytes: int
    swaps: int
    layers: tuple[LayerMetrics, ...]

    @property
    def hit_rate(self) -> float | None:
        """The part of all rows whose expert was on the device; None: there were no rows."""
        rows = self.total("rows")
        return self.total("device_rows") / rows if rows else None

    def total(self, name: str) -> float:
        """Return the sum over all layers of a field of `Activity`, as "bytes_streamed"."""
        return math.fsum(getattr(layer.activity, name) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON has."""
        return {
            "device": self.device,
            "device_memory_bytes": self.device_memory_bytes,
            "device_used_bytes": self.device_used_bytes,
            "swaps": self.swaps,
            "hit_rate": self.hit_rate,
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def summary(self) -> str:
        """Return one line for people."""
        resident = sum(len(layer.resident) for layer in self.layers)
        experts = sum(layer.num_experts for layer in self.layers)
        moved = self.total("bytes_moved")
        sent = self.total("streamed_rows") / max(1, self.total("rows"))
        rate = f"{self.hit_rate or 0.0:.0%} of their tokens there, {sent:.0%} sent there"
        cpu, device, both = (self.total(f"{who}_seconds") for who in ("cpu", "device", "overlap"))
        return (
            f"experts {resident} of {experts} on the {self.device} device | {rate} | {self.swaps} swaps | "
            f"{moved / 1e6:,.1f} MB copied | CPU {cpu:.2f} s, device {device:.2f} s, both {both:.2f} s"
        )


def metrics_of(layers: Sequence[PackedExperts]) -> ExpertMetrics:
    """Return the state of split layers, in the order of their model. ValueError: there are none."""
    split = [experts.split for experts in layers if isinstance(experts.split, SplitExperts)]
    if not split:
        raise ValueError("no layer has experts on a device")
    device = split[0].device
    swaps = sum(layer.adaptive.swaps for layer in split if layer.adaptive is not None)
    return ExpertMetrics(device.name, device.memory_bytes, device.used_bytes, swaps, tuple(map(_of_layer, split)))


def _of_layer(layer: SplitExperts) -> LayerMetrics:
    chosen = tuple(int(rows) for rows in layer.chosen_E)
    return LayerMetrics(tuple(sorted(layer.resident)), chosen, replace(layer.activity))
