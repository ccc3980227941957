"""Which experts to swap between CPU and device while a program runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ktcompile.plan.demand import Demand
from ktcompile.plan.order import ascending
from ktcompile.plan.outlook import Outlook
from ktcompile.plan.residency import NO_MOVES, Moves
from ktcompile.plan.table import ExpertTable, Floats, Mask


@dataclass(frozen=True, slots=True)
class ReplanConfig:
    """When experts move between the sides, and for what gain.

    interval: decode steps between two plans; one is also made after each prefill step. Shorter ones follow a change of
    subject sooner, longer ones cost fewer copies.
    horizon: decode steps over which a move must earn what its copies cost. It is how long the traffic is trusted to
    stay as it is.
    margin: by which share of their cost moves must earn more than their copies cost, which keeps experts of nearly
    equal use where they are.
    link_share: share of the link's time in an interval that copies may take, from 0 (nothing moves but what passes by
    in prefill) to 1.
    ValueError: a value is out of its range.
    """

    interval: int = 256
    horizon: int = 256
    margin: float = 0.25
    link_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("interval", "horizon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of decode steps, at least 1")
        for name, most in (("margin", math.inf), ("link_share", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                limit = "not be negative" if most == math.inf else f"be from 0 to {most:g}"
                raise ValueError(f"{name} is {value!r}; it must {limit}")


def replan(
    table: ExpertTable,
    demand: Demand,
    resident_LE: Mask,
    budget_bytes: int,
    link_seconds: float,
    config: ReplanConfig,
    cpu_busy: float = 1.0,
    passing_LE: Mask | None = None,
) -> Moves:
    """Return the moves that save most, each exchange paying for its copies within the horizon.

    An expert whose layer is faster without it leaves the device even if none takes its room.

    resident: which experts are on the device [L, E]. link_seconds: for which the link may copy each way, at once in
    both directions. cpu_busy: share of the time in which the CPU reads weights; copies take memory bandwidth away from
    it then, and cost nothing else. passing: experts whose weights are on the device at this moment, as a layer was
    streamed, so that to keep them costs no copy; the copies of experts that make room run against the stream.
    """
    copies = (cpu_busy * (1 + config.margin) / table.hardware.cpu.bandwidth) * table.bytes[:, None]
    free_LE = resident_LE if passing_LE is None else resident_LE | passing_LE
    # Between experts of a layer that are used about as much, the one whose copy costs nothing comes first.
    ahead = copies * (free_LE.astype(np.float64) + resident_LE) / config.horizon
    outlook = Outlook(table, demand)
    # A steadier share for the CPU may be too many moves away; what is left is to give it what is seldom used.
    for steady_within in (float(budget_bytes), 0.0):
        seconds = outlook.marginal_savings(steady_within, resident_LE, ahead)
        seconds *= config.horizon
        moves = _best(table, seconds.reshape(-1), resident_LE, budget_bytes, link_seconds, copies[:, 0], passing_LE)
        if not len(moves) or _pays(moves, outlook, resident_LE, copies[:, 0], config.horizon):
            return moves
    return NO_MOVES


def _best(
    table: ExpertTable,
    value: Floats,
    resident_LE: Mask,
    budget: int,
    link_seconds: float,
    copies: Floats,
    passing_LE: Mask | None,
) -> Moves:
    """Return the moves that save most, given what each expert saves [L * E], by the sum of this.

    copies [L]: what a copy costs.
    """
    alike = bool(np.ptp(table.bytes) == 0)
    # Of experts of one size one number says it all.
    size, cost, link = (a[0] if alike else np.repeat(a, table.shape[1]) for a in (table.bytes, copies, table.link))
    density, hot = value / size, resident_LE.reshape(-1)
    incoming, outgoing = _candidates(density, hot, int(budget // table.bytes.min()), alike=alike)
    incoming = incoming[ascending(-density[incoming])]
    outgoing = outgoing[ascending(density[outgoing])]
    cost_in, link_in, beside = cost, link, 0.0
    if passing_LE is not None:
        passes = passing_LE.reshape(-1)
        cost_in, link_in = np.where(passes, 0.0, cost), np.where(passes, 0.0, link)
        beside = float(table.link @ passing_LE.sum(axis=1))
    return _exchange(
        _Side(incoming, value, size, cost_in, link_in),
        _Side(outgoing, value, size, cost, link),
        budget - float(table.bytes @ resident_LE.sum(axis=1)),
        link_seconds,
        link_seconds + beside,
    )


def _candidates(density: Floats, hot: Mask, room: int, *, alike: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the experts that may come to the device and those that may leave it.

    Where all have one size the device should have the `room` experts that save most: none below the last of these comes
    for what another saves, and none above it goes.
    """
    bound = 0.0
    if alike and room < len(density):
        bound = float(np.partition(density, -max(room, 1))[-max(room, 1)])
    incoming = np.flatnonzero(~hot & (density > 0) & (density >= bound))
    outgoing = np.flatnonzero(hot & (density <= max(bound, 0.0))) if alike else np.flatnonzero(hot)
    return incoming, outgoing


def _pays(moves: Moves, outlook: Outlook, resident_LE: Mask, copies: Floats, horizon: int) -> bool:
    """Return whether moves save more together than their copies cost. What single ones save does not add up exactly."""
    after = resident_LE.copy()
    after.reshape(-1)[moves.experts] = moves.to_device
    now, then = outlook.step_seconds(resident_LE, after)
    return (now - then) * horizon > float(copies[moves.experts // resident_LE.shape[1]].sum())


class _Side:
    """Experts that may leave one side, in order, and the sums over the first n of them.

    value, size, cost, link: of each expert [L * E], or a number that all have.
    """

    def __init__(
        self, experts: np.ndarray, value: Floats, size: Floats | float, cost: Floats | float, link: Floats | float
    ) -> None:
        self.experts = experts
        self.value, self.size, self.cost, self.link = (_sums(a, experts) for a in (value, size, cost, link))


def _exchange(into: _Side, out: _Side, free: float, seconds_in: float, seconds_out: float) -> Moves:
    """Return the exchange of the first n incoming experts for the outgoing ones that make room, for the best n.

    seconds_in, seconds_out: for which the link may copy each way.
    """
    # So many outgoing experts are better gone whatever comes, as far as the link carries them.
    alone = int(np.argmin(np.where(out.link <= seconds_out, out.value + out.cost, np.inf)))
    # Room for the first n incoming experts is made by the first leaving[n] outgoing ones.
    leaving = np.searchsorted(out.size, into.size - free - 0.5)
    possible = leaving < len(out.size)
    leaving = np.maximum(np.minimum(leaving, len(out.experts)), alone)
    gain = into.value - out.value[leaving] - into.cost - out.cost[leaving]
    gain[~possible | (into.link > seconds_in) | (out.link[leaving] > seconds_out)] = -np.inf
    best = int(np.argmax(gain))
    if gain[best] <= 0:
        return NO_MOVES
    ordered, to_device = _in_order(into.experts[:best], out.experts[: leaving[best]], leaving[: best + 1])
    return Moves(ordered, to_device, float(into.link[best]), float(gain[best]))


def _in_order(into: np.ndarray, out: np.ndarray, leaving: np.ndarray) -> tuple[np.ndarray, Mask]:
    """Return experts so that those that make room for one go just before it."""
    # An incoming expert n comes after leaving[n + 1] outgoing ones, and after n incoming ones. Those that leave without
    # making room are first.
    position_in = leaving[1:] + np.arange(len(into))
    ordered = np.empty(len(into) + len(out), dtype=np.int64)
    to_device = np.zeros(len(ordered), dtype=np.bool_)
    to_device[position_in] = True
    ordered[to_device] = into
    ordered[~to_device] = out
    return ordered, to_device


def _sums(values: Floats | float, experts: np.ndarray) -> Floats:
    if not isinstance(values, np.ndarray):
        return values * np.arange(len(experts) + 1.0)
    sums = np.zeros(len(experts) + 1)
    np.cumsum(values[experts], out=sums[1:])
    return sums
