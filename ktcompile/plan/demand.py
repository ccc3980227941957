"""What traffic is expected, and the seconds that an expert on the device saves under it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktcompile.plan.cost import Work, layer_cost
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.step_curves import StepCurves
from ktcompile.plan.table import ExpertTable, Floats, Mask

# How many of a layer's experts may be left to the CPU for being used by nearly all steps, and which share of a step this
# must save.
_PINNED = (0, 1, 2, 3, 4, 6, 8)
_WORTH_PINNING = 0.002
# More seconds than any expert saves.
_LAST = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Expected traffic for each decode step.

    touches [L, E]: the share of decode steps in which an expert has tokens. touch_rows: its tokens in such a step.
    prefill_rows [L, E]: its tokens in a prefill step. prefills: prefill steps for each decode step.
    """

    touches: Floats
    touch_rows: float
    prefill_rows: Floats
    prefills: float

    @classmethod
    def of_profile(cls, profile: RoutingProfile) -> Demand:
        """Return the traffic that a profile recorded; each phase stands in for the other if only one was seen."""
        decode, prefill = profile.steps(Phase.DECODE), profile.steps(Phase.PREFILL)
        tokens = profile.tokens(Phase.DECODE) + profile.tokens(Phase.PREFILL)
        if not tokens:
            nothing = np.zeros(profile.shape)
            return cls(nothing, 1.0, nothing, 0.0)
        rates = (profile.rows(Phase.DECODE) + profile.rows(Phase.PREFILL)) / tokens
        touched = profile.touched(Phase.DECODE)
        touches = touched / decode if decode else np.minimum(rates, 1.0)
        per_touch = float(profile.rows(Phase.DECODE).sum() / touched.sum()) if touched.any() else 1.0
        prefill_rows = profile.rows(Phase.PREFILL) / prefill if prefill else np.zeros(profile.shape)
        return cls(touches, per_touch, prefill_rows, prefill / decode if decode else 0.0)


def savings(table: ExpertTable, demand: Demand) -> Floats:
    """Return the CPU's seconds for each decode step that go if an expert moves to the device [L, E].

    In decode an expert costs its weights' reading in each step that touches it; in prefill, its rows' products, or, as
    cold experts may be streamed, the copy of its weights if that is less.
    """
    decode = demand.touches * table.cpu_seconds(np.full(table.shape, demand.touch_rows))
    saved: Floats = decode + _prefill(table, demand)
    return saved


def layer_seconds(table: ExpertTable, demand: Demand, order_LE: np.ndarray) -> Floats:
    """Return a layer's expected seconds for each decode step with its first n experts on the device [L, E + 1].

    order [L, E]: ids, the first to go to the device first. A prefill step costs what its mean does.
    """
    touches = demand.touches
    cold, certain = (_cold_sums(values, order_LE) for values in (touches, touches * touches))
    hot = cold[:, :1] - cold
    if not touches.any():
        cold = np.broadcast_to(np.linspace(1.0, 0.0, cold.shape[1]), cold.shape)
    # Independent touches would vary by the sum of t (1 - t) on each side; that both sides' add up to a fixed number
    # leaves this of it.
    own, other = cold - certain, hot - (certain[:, :1] - certain)
    variance = own * other / np.maximum(own + other, 1e-30)
    seconds = StepCurves(table, touches.sum(axis=1), demand.touch_rows).at(cold, variance)
    return seconds + _prefill_seconds(table, demand, order_LE) if demand.prefills else seconds


def marginal_savings(
    table: ExpertTable, demand: Demand, ahead: Floats | float = 0.0, pinned: Mask | None = None
) -> Floats:
    """Return by how much an expert speeds its layer up if it comes to the device after all that save more [L, E].

    It is the seconds for each decode step by which `layer_seconds` falls, so that where the device is the slower side
    already, or soon would be, an expert saves little, or costs: then it is negative. Within a layer it never rises from
    one expert to the next, and what is taken in this order saves at least as much as the sum says. ahead [L, E]:
    seconds that an expert is put ahead of others in its layer's order. pinned [L, E]: experts that come last.
    """
    order = _order(table, demand, ahead, pinned)
    seconds = layer_seconds(table, demand, order)
    gains = np.minimum.accumulate(seconds[:, :-1] - seconds[:, 1:], axis=1)
    # What differs by rounding is no gain.
    gains = np.where(np.abs(gains) > 1e-12 * seconds[:, :1], gains, 0.0)
    # Equal gains must be taken in the layer's order too.
    gains -= np.abs(gains) * (1e-9 * np.arange(gains.shape[1]))
    result = np.empty_like(gains)
    np.put_along_axis(result, order, gains, axis=1)
    return np.where(table.exists, result, 0.0)


def steadying(table: ExpertTable, demand: Demand, budget_bytes: float, resident_LE: Mask | None = None) -> Mask:
    """Return the experts [L, E] that are best left to the CPU although most steps use them.

    Where the device is the slower side and has room, the CPU should have a share of each step. A few experts that
    nearly all steps use give it a steadier share than many that are seldom used. Experts on the device must be used by
    a quarter more to be chosen.
    """
    share = min(budget_bytes / float((table.exists * table.bytes[:, None]).sum()), 1.0)
    rank = demand.touches if resident_LE is None else demand.touches * np.where(resident_LE, 0.8, 1.0)
    popular = np.argsort(np.where(table.exists, -rank, np.inf), axis=1)
    room = np.floor(share * table.exists.sum(axis=1) + 1e-9)
    best = np.full(table.shape[0], np.inf)
    chosen = np.zeros(table.shape, dtype=np.bool_)
    for count in _PINNED:
        if count > table.shape[1]:
            break
        mask = np.zeros(table.shape, dtype=np.bool_)
        np.put_along_axis(mask, popular[:, :count], True, axis=1)
        seconds = layer_seconds(table, demand, _order(table, demand, 0.0, mask))
        seconds = np.where(np.arange(seconds.shape[1]) <= room[:, None], seconds, np.inf).min(axis=1)
        better = seconds < best * (1 - _WORTH_PINNING)
        chosen[better], best[better] = mask[better], seconds[better]
    return chosen


def step_seconds(table: ExpertTable, demand: Demand, resident_LE: Mask) -> float:
    """Return the expected seconds of all layers' experts for each decode step, prefills shared out among them."""
    order = np.argsort(~resident_LE, axis=1, kind="stable")
    seconds = layer_seconds(table, demand, order)
    return float(np.take_along_axis(seconds, resident_LE.sum(axis=1)[:, None], axis=1).sum())


def _order(table: ExpertTable, demand: Demand, ahead: Floats | float, pinned: Mask | None) -> np.ndarray:
    last = 0.0 if pinned is None else np.where(pinned, _LAST, 0.0)
    return np.argsort(np.where(table.exists, last - savings(table, demand) - ahead, np.inf), axis=1)


def _prefill(table: ExpertTable, demand: Demand) -> Floats:
    if not demand.prefills:
        return np.zeros(table.shape)
    rows = demand.prefill_rows
    seconds = np.minimum(table.cpu_seconds(rows), table.link[:, None]) * (1 - np.exp(-rows))
    saved: Floats = demand.prefills * seconds
    return saved


def _prefill_seconds(table: ExpertTable, demand: Demand, order_LE: np.ndarray) -> Floats:
    """Return a layer's seconds in prefills for each decode step, with its first n experts on the device [L, E + 1]."""
    rows = demand.prefill_rows
    used = -np.expm1(-rows)
    times = [used * np.maximum(read[:, None], rows * row[:, None]) for read, row in table.sides]
    cold, cpu, away = (_cold_sums(values, order_LE) for values in (used, *times))
    work = Work(
        cold=cold,
        hot=cold[:, :1] - cold,
        cpu=cpu,
        device=away[:, :1] - away,
        all_device=away[:, :1],
        last=times[1].max(axis=1, keepdims=True),
        copy=cold * table.link[:, None],
    )
    seconds: Floats = demand.prefills * layer_cost(table.hardware, work).total
    return seconds


def _cold_sums(values_LE: Floats, order_LE: np.ndarray) -> Floats:
    """Return the sums over all experts but the first n of an order [L, E + 1]."""
    sums = np.zeros((values_LE.shape[0], values_LE.shape[1] + 1))
    np.cumsum(np.take_along_axis(values_LE, order_LE, axis=1)[:, ::-1], axis=1, out=sums[:, 1:])
    return sums[:, ::-1]
