"""The frozen result of placement: which experts are on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktcompile.plan.facts import ModelFacts
from ktcompile.plan.table import Mask, exists


@dataclass(frozen=True, slots=True)
class Plan:
    """Experts on the device, ascending ids for each layer; all others are on the CPU. A plan that exists is valid.

    budget_bytes: what the experts on the device may take. strategy: what placed them. reasons: for people.
    ValueError: ids are out of range, unordered or repeated, or they take more than the budget.
    """

    facts: ModelFacts
    resident: tuple[tuple[int, ...], ...]
    budget_bytes: int
    strategy: str
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.budget_bytes < 0:
            raise ValueError(f"the budget is {self.budget_bytes} bytes; it must not be negative")
        if len(self.resident) != len(self.facts.layers):
            raise ValueError(f"the plan is for {len(self.resident)} layers; the model has {len(self.facts.layers)}")
        for index, (layer, ids) in enumerate(zip(self.facts.layers, self.resident, strict=True)):
            if list(ids) != sorted(set(ids)):
                raise ValueError(f"layer {index}: ids of experts must ascend and differ")
            if ids and not 0 <= ids[0] <= ids[-1] < layer.num_experts:
                raise ValueError(f"layer {index} has experts 0 to {layer.num_experts - 1}; the plan names {ids}")
        if self.device_bytes > self.budget_bytes:
            raise ValueError(f"the experts take {self.device_bytes} bytes; the budget is {self.budget_bytes}")

    @classmethod
    def of_mask(
        cls, facts: ModelFacts, mask_LE: Mask, budget_bytes: int, strategy: str, reasons: tuple[str, ...] = ()
    ) -> Plan:
        """Return the plan that has the experts of a mask [L, E] on the device."""
        resident = tuple(tuple(np.flatnonzero(row).tolist()) for row in mask_LE)
        return cls(facts, resident, budget_bytes, strategy, reasons)

    @property
    def device_bytes(self) -> int:
        """Bytes of the experts on the device."""
        return sum(len(ids) * layer.expert_bytes for layer, ids in zip(self.facts.layers, self.resident, strict=True))

    @property
    def num_resident(self) -> int:
        """Experts on the device."""
        return sum(len(ids) for ids in self.resident)

    def mask(self) -> Mask:
        """Return which experts are on the device [L, E], E being the most experts of a layer."""
        mask = np.zeros_like(exists(self.facts))
        for row, ids in zip(mask, self.resident, strict=True):
            row[list(ids)] = True
        return mask
