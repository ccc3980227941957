"""Moves the experts of a model between its two sides, by what its routers choose while it runs.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from ktcompile.log import logger
from ktcompile.plan.demand import Demand
from ktcompile.plan.facts import ModelFacts
from ktcompile.plan.forecast import Forecast
from ktcompile.plan.hardware import Hardware
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.replan import ReplanConfig, replan
from ktcompile.plan.table import ExpertTable, Mask
from ktcompile.runtime.device import DeviceMemoryError
from ktcompile.runtime.split import SplitExperts

# A call with more tokens is a prompt's.
MOST_DECODED = 16


def phase_of(tokens: int) -> Phase:
    """Return what a call of so many tokens is taken for."""
    return Phase.PREFILL if tokens > MOST_DECODED else Phase.DECODE


class AdaptivePlacement:
    """Plans anew every so many decode steps and after each prompt, and makes the moves between calls.

    layers: of one model, in its order. budget_bytes: what their experts may take on the device. clock: seconds, for the
    time that the link has had since the last plan.
    """

    def __init__(
        self,
        layers: Sequence[SplitExperts],
        facts: ModelFacts,
        hardware: Hardware,
        budget_bytes: int,
        config: ReplanConfig | None = None,
        profile: RoutingProfile | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.layers, self._budget, self._config = tuple(layers), budget_bytes, config or ReplanConfig()
        self._table = ExpertTable.of(facts, hardware)
        self._forecast = Forecast(self._table.shape, self._table.top_k, profile)
        self._rows, self._touched = np.zeros(self._table.shape), np.zeros(self._table.shape)
        self._tokens = self._steps = 0
        self._moves: deque[tuple[int, int, bool]] = deque()
        self._clock = clock
        self._planned_at = clock()
        self.swaps = 0

    def step(self) -> None:
        """Take note of what the layers were asked since the last step, plan if it is time, and begin moves."""
        counts = [layer.take_counts() for layer in self.layers]
        tokens = max(c.tokens for c in counts)
        if not tokens:
            return
        rows, touched = np.zeros(self._table.shape), np.zeros(self._table.shape)
        for index, c in enumerate(counts):
            rows[index, : len(c.rows)], touched[index, : len(c.touched)] = c.rows, c.touched
        if phase_of(tokens) is Phase.PREFILL:
            self._observe_decoded()
            self._forecast.observe(rows, touched, tokens, 1, Phase.PREFILL)
            self._plan()
        else:
            self._rows += rows
            self._touched += touched
            self._tokens, self._steps = self._tokens + tokens, self._steps + 1
            if self._steps >= self._config.interval:
                self._observe_decoded()
                self._plan()
        self._begin_moves()

    def resident(self) -> Mask:
        """Return which experts are on the device [L, E]."""
        mask = np.zeros(self._table.shape, dtype=np.bool_)
        for row, layer in zip(mask, self.layers, strict=True):
            row[list(layer.resident)] = True
        return mask

    def demand(self) -> Demand:
        """Return the traffic that is expected now."""
        return self._forecast.demand()

    def _held(self) -> float:
        """Return the bytes of the experts that are on the device, on their way to it, or leaving it."""
        held = [len(layer.resident | layer.moving) for layer in self.layers]
        return float((self._table.bytes * held).sum())

    def _observe_decoded(self) -> None:
        if self._steps:
            self._forecast.observe(self._rows, self._touched, self._tokens, self._steps, Phase.DECODE)
        self._rows[:], self._touched[:] = 0, 0
        self._tokens = self._steps = 0

    def _plan(self) -> None:
        now = self._clock()
        passed, self._planned_at = now - self._planned_at, now
        if self._moves or any(layer.moving for layer in self.layers):
            return  # what was decided comes first
        link_seconds = passed * self._config.link_share
        moves = replan(self._table, self.demand(), self.resident(), self._budget, link_seconds, self._config)
        width = self._table.shape[1]
        self._moves.extend(
            (*divmod(int(expert), width), bool(to_device))
            for expert, to_device in zip(moves.experts, moves.to_device, strict=True)
        )

    def _begin_moves(self) -> None:
        """Begin all moves for which there is room; the others wait until experts have left."""
        waiting: deque[tuple[int, int, bool]] = deque()
        held = self._held()
        for index, expert, to_device in self._moves:
            layer = self.layers[index]
            try:
                if to_device and held + self._table.bytes[index] > self._budget:
                    raise DeviceMemoryError("others have to leave first")
                layer.promote(expert) if to_device else layer.demote(expert)
            except DeviceMemoryError:
                waiting.append((index, expert, to_device))
            except ValueError as error:  # it was moved otherwise meanwhile
                logger.warning("layer %d: %s", index, error)
            else:
                self.swaps += to_device
                held += self._table.bytes[index] if to_device else 0.0
        if waiting and not any(layer.moving for layer in self.layers):
            logger.warning("the device has no room for %d experts that should move there", len(waiting))
            waiting.clear()
        self._moves = waiting
