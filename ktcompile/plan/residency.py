"""Which experts are on the device while a program runs, and which are being copied."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktcompile.plan.plan import Plan
from ktcompile.plan.table import Mask, exists


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
    """The sides of all experts. Each is on exactly one side at any time: a move copies, then switches, then releases.

    Whoever runs the moves calls `begin` before a copy and `finish` or `fail` after it, for each move in turn.
    """

    def __init__(self, plan: Plan) -> None:
        self.facts = plan.facts
        self.budget_bytes = plan.budget_bytes
        self._exists = exists(plan.facts)
        self._bytes = np.array([layer.expert_bytes for layer in plan.facts.layers], dtype=np.int64)
        self._resident = plan.mask()
        self._resident.setflags(write=False)
        self._moving: dict[int, bool] = {}
        self._used = plan.device_bytes

    @property
    def resident(self) -> Mask:
        """Which experts are on the device [L, E]; it cannot be written to."""
        return self._resident

    @property
    def moving(self) -> frozenset[int]:
        """Flat indices of the experts that are being copied."""
        return frozenset(self._moving)

    @property
    def used_bytes(self) -> int:
        """Bytes taken on the device, by experts there and by those on their way to it."""
        return self._used

    def begin(self, expert: int, to_device: bool) -> bool:
        """Reserve room for a copy; return False if the move cannot be made: no room, on its way, or there already."""
        layer, index = self._place(expert)
        if expert in self._moving or bool(self._resident[layer, index]) == to_device:
            return False
        size = int(self._bytes[layer])
        if to_device and self._used + size > self.budget_bytes:
            return False
        self._used += size if to_device else 0
        self._moving[expert] = to_device
        return True

    def finish(self, expert: int) -> None:
        """Switch an expert whose copy is complete to its new side. ValueError: it is not being copied."""
        layer, index = self._place(expert)
        to_device = self._ended(expert)
        resident = self._resident.copy()  # what was read before the switch stays as it was
        resident[layer, index] = to_device
        resident.setflags(write=False)
        self._resident = resident
        self._used -= 0 if to_device else int(self._bytes[layer])

    def fail(self, expert: int) -> None:
        """Leave an expert whose copy failed where it is. ValueError: it is not being copied."""
        layer, _ = self._place(expert)
        if self._ended(expert):
            self._used -= int(self._bytes[layer])

    def apply(self, moves: Moves) -> None:
        """Make all moves at once, as if each copy had succeeded in turn. Nothing else may be on its way."""
        assert not self._moving, "experts are being copied"
        flat = self._resident.copy().reshape(-1)
        assert (flat[moves.experts] != moves.to_device).all(), "an expert is there already"
        flat[moves.experts] = moves.to_device
        resident = flat.reshape(self._resident.shape)
        used = int((resident.sum(axis=1) * self._bytes).sum())
        assert used <= self.budget_bytes, "the moves need more room than there is"
        resident.setflags(write=False)
        self._resident, self._used = resident, used

    def plan(self, strategy: str, reasons: tuple[str, ...] = ()) -> Plan:
        """Return today's sides as a plan."""
        return Plan.of_mask(self.facts, self._resident, self.budget_bytes, strategy, reasons)

    def _ended(self, expert: int) -> bool:
        if expert not in self._moving:
            raise ValueError(f"expert {expert} is not being copied")
        return self._moving.pop(expert)

    def _place(self, expert: int) -> tuple[int, int]:
        layer, index = divmod(expert, self._exists.shape[1])
        if not (0 <= layer < len(self._bytes) and self._exists[layer, index]):
            raise ValueError(f"there is no expert {expert}")
        return layer, index
