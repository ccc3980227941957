"""Times of the steps of a trace between two moments at which placement may change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktcompile.plan.cost import LayerCost, Way, Work, layer_cost
from ktcompile.plan.facts import ModelFacts
from ktcompile.plan.hardware import Hardware
from ktcompile.plan.profile import Phase
from ktcompile.plan.table import ExpertTable, Floats, Mask
from ktcompile.plan.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class IntervalCost:
    """layers: of all layer-steps [S * L]. cpu_read: seconds in which the CPU waits for weights, of all together.
    streamed_bytes: of all together. hits [L * E]: tokens of experts on the device."""

    layers: LayerCost
    cpu_read: float
    streamed_bytes: float
    hits: Floats


class Interval:
    """Steps [begin, end) of a trace, all decode or one prefill, with the times of each used expert on each side.

    slot: which layer-step `step * L + layer` an entry is of. expert: its flat index `layer * E + expert`.
    cpu, device: its seconds there. all_device, largest: the device's seconds of a layer-step for all of its entries
    and for the longest of them.
    """

    def __init__(self, trace: Trace, begin: int, end: int, table: ExpertTable) -> None:
        layers, experts = table.shape
        self.begin, self.end, self.num_slots = begin, end, (end - begin) * layers
        self.phase = Phase.PREFILL if trace.prefill[begin] else Phase.DECODE
        self.tokens = trace.tokens[begin:end]
        low, high = begin * layers, end * layers
        first, last = trace.offsets[low], trace.offsets[high]
        used = np.diff(trace.offsets[low : high + 1])
        self.slot = np.repeat(np.arange(self.num_slots), used)
        self.layer = self.slot % layers
        self.rows = trace.rows[first:last].astype(np.float64)
        self.expert = self.layer * experts + trace.experts[first:last]
        self.table = table
        self.read = table.cpu_read[self.layer]
        self.cpu = np.maximum(self.read, self.rows * table.cpu_row[self.layer])
        self.device = np.maximum(table.device_read[self.layer], self.rows * table.device_row[self.layer])
        self.used = used
        self.all_device = self.per_slot(self.device)
        self.largest = np.zeros(self.num_slots)
        np.maximum.at(self.largest, self.slot, self.device)
        self.link = np.tile(table.link, end - begin)

    @property
    def num_steps(self) -> int:
        return self.end - self.begin

    def per_slot(self, values: Floats) -> Floats:
        """Return the sums over the entries of each layer-step [S * L]."""
        sums: Floats = np.bincount(self.slot, weights=values, minlength=self.num_slots).astype(np.float64)
        return sums

    def per_expert(self, values: Floats) -> Floats:
        """Return the sums over the entries of each expert [L, E]."""
        return self._expert_sums(self.expert, values).reshape(self.table.shape)

    def counts(self, first_step: int, last_step: int) -> tuple[Floats, Floats]:
        """Return the tokens of each expert [L, E] in steps [first, last) of the interval, and its steps with tokens."""
        layers = self.table.shape[0]
        low, high = np.searchsorted(self.slot, (first_step * layers, last_step * layers))
        rows = self._expert_sums(self.expert[low:high], self.rows[low:high])
        touched = self._expert_sums(self.expert[low:high], np.ones(high - low))
        return rows.reshape(self.table.shape), touched.reshape(self.table.shape)

    def cost(self, resident_LE: Mask, way: Way = "cheaper") -> IntervalCost:
        """Return what all layer-steps take with these experts on the device."""
        hot = resident_LE.reshape(-1)[self.expert]
        cold = self.per_slot((~hot).astype(np.float64))
        work = Work(
            cold=cold,
            hot=self.used - cold,
            cpu=self.per_slot(np.where(hot, 0.0, self.cpu)),
            device=self.per_slot(np.where(hot, self.device, 0.0)),
            all_device=self.all_device,
            last=self.largest,
            copy=cold * self.link,
        )
        layers = layer_cost(self.table.hardware, work, way)
        reads = np.where(hot | layers.streamed[self.slot], 0.0, self.read)
        return IntervalCost(
            layers=layers,
            cpu_read=float(reads.sum()),
            streamed_bytes=float((layers.streamed * cold * np.tile(self.table.bytes, self.num_steps)).sum()),
            hits=self._expert_sums(self.expert, np.where(hot, self.rows, 0.0)),
        )

    def _expert_sums(self, experts: NDArray[np.int64], values: Floats) -> Floats:
        sums: Floats = np.bincount(experts, weights=values, minlength=self.table.exists.size).astype(np.float64)
        return sums


def dense_seconds(facts: ModelFacts, hardware: Hardware, tokens: Floats) -> Floats:
    """Return the device's seconds for all but the experts in steps of these tokens: weights, products, launches."""
    assert hardware.device is not None
    device = hardware.device
    work = np.maximum(facts.dense_bytes / device.bandwidth, tokens * (facts.dense_flops_per_token / device.flops))
    result: Floats = work + len(facts.layers) * device.overhead
    return result
