"""What traffic is expected, and the seconds that an expert on the device saves under it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.table import ExpertTable, Floats, Mask

_SQRT_2PI = float(np.sqrt(2 * np.pi))


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

    order [L, E]: ids, the first to go to the device first. CPU and device work side by side, and what a step touches
    varies: the expectation of the larger is above the larger expectation. The CPU's time is taken as normal, with the
    mean and variance of independent touches.
    """

    def cold(values: Floats) -> Floats:
        sums = np.zeros((len(values), values.shape[1] + 1))
        np.cumsum(values[:, ::-1], axis=1, out=sums[:, 1:])
        return sums[:, ::-1]

    touches = np.take_along_axis(demand.touches, order_LE, axis=1)
    each_cpu = table.cpu_seconds(np.full((table.shape[0], 1), demand.touch_rows))
    each_device = table.device_seconds(np.full((table.shape[0], 1), demand.touch_rows))
    count = cold(touches)
    all_touches = count[:, :1]
    hot = np.maximum(all_touches - count, 0.0)
    device = table.device_overhead * (1 - np.exp(-hot)) + each_device * hot
    cpu = table.cpu_overhead * (1 - np.exp(-count)) + each_cpu * count
    prefill = cold(np.take_along_axis(_prefill(table, demand), order_LE, axis=1))
    return device + _mean_excess(cpu - device, each_cpu * np.sqrt(count)) + prefill


def marginal_savings(table: ExpertTable, demand: Demand, ahead: Floats | float = 0.0) -> Floats:
    """Return by how much an expert speeds its layer up if it comes to the device after all that save more [L, E].

    It is the seconds for each decode step by which `layer_seconds` falls, so that where the device is the slower side
    already, or soon would be, an expert saves little or nothing. Within a layer it never rises from one expert to the
    next, and what is taken in this order saves at least as much as the sum says. ahead [L, E]: seconds that an expert
    is put ahead of others in its layer's order.
    """
    order = np.argsort(np.where(table.exists, -savings(table, demand) - ahead, np.inf), axis=1)
    seconds = layer_seconds(table, demand, order)
    gains = np.minimum.accumulate(seconds[:, :-1] - seconds[:, 1:], axis=1)
    # What differs by rounding is no gain.
    gains = np.where(gains > 1e-12 * seconds[:, :1], gains, 0.0)
    # Equal gains must be taken in the layer's order too.
    gains *= 1 - 1e-9 * np.arange(gains.shape[1])
    result = np.empty_like(gains)
    np.put_along_axis(result, order, gains, axis=1)
    return np.where(table.exists, result, 0.0)


def step_seconds(table: ExpertTable, demand: Demand, resident_LE: Mask) -> float:
    """Return the expected seconds of all layers' experts for each decode step, prefills shared out among them."""
    order = np.argsort(~resident_LE, axis=1, kind="stable")
    seconds = layer_seconds(table, demand, order)
    return float(np.take_along_axis(seconds, resident_LE.sum(axis=1)[:, None], axis=1).sum())


def _prefill(table: ExpertTable, demand: Demand) -> Floats:
    if not demand.prefills:
        return np.zeros(table.shape)
    rows = demand.prefill_rows
    seconds = np.minimum(table.cpu_seconds(rows), table.link[:, None]) * (1 - np.exp(-rows))
    saved: Floats = demand.prefills * seconds
    return saved


def _mean_excess(mean: Floats, deviation: Floats) -> Floats:
    """Return the mean of what a normal variable has above zero."""
    z = mean / np.maximum(deviation, 1e-30)
    z = np.clip(z, -8.0, 8.0)
    # The normal distribution function within 0.0002 (a known logistic fit); numpy has no erf.
    below = 1.0 / (1.0 + np.exp(-z * (0.07056 * z * z + 1.5976)))
    excess: Floats = np.maximum(deviation * np.exp(-0.5 * z * z) / _SQRT_2PI + mean * below, np.maximum(mean, 0.0))
    return excess
