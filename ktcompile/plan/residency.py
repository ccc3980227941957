"""Which experts are on the device while a program runs, and moves between the sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktcompile.plan.plan import Plan
from ktcompile.plan.table import Mask


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Experts to move, as flat indices `layer * E + expert`, in an order in which there is always room.

    to_device: which way each goes. seconds: what the link takes for those that it does not carry anyhow.
    saved: seconds that they are expected to save over the horizon, less what they cost.
    """

    experts: NDArray[np.int64]
    to_device: Mask
    seconds: float
    saved: float

    def __len__(self) -> int:
        return len(self.experts)


NO_MOVES = Moves(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_), 0.0, 0.0)


class Residency:
    """Which experts are on the device, while a plan changes."""

    def __init__(self, plan: Plan) -> None:
        self.budget_bytes = plan.budget_bytes
        self._bytes = np.array([layer.expert_bytes for layer in plan.facts.layers], dtype=np.int64)
        self._resident = plan.mask()
        self._resident.setflags(write=False)

    @property
    def resident(self) -> Mask:
        """Which experts are on the device [L, E]; it cannot be written to, and moves leave it as it was."""
        return self._resident

    def apply(self, moves: Moves) -> None:
        """Make all moves at once, as if each copy had succeeded in turn."""
        flat = self._resident.copy().reshape(-1)
        assert (flat[moves.experts] != moves.to_device).all(), "an expert is there already"
        flat[moves.experts] = moves.to_device
        resident = flat.reshape(self._resident.shape)
        used = int((resident.sum(axis=1) * self._bytes).sum())
        assert used <= self.budget_bytes, "the moves need more room than there is"
        resident.setflags(write=False)
        self._resident = resident
