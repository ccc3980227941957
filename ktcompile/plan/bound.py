"""A lower bound on the time of an interval over all placements, for a planner that knows it in advance.

The best placement itself is a knapsack with a maximum of two sums in each layer-step. The bound relaxes it, so no
placement is faster: each layer gets a function F(n) that is no more than its time with any n experts on the device,
and the sum of these within the budget is bounded by its Lagrangian dual, which holds for every price of a byte.
"""

from __future__ import annotations

import numpy as np

from ktcompile.plan.interval import Interval
from ktcompile.plan.table import Floats

_PRICE_STEPS = 40
# Steps of the ascent towards the best mixture of bounds.
_ASCENT = (2.0, 2.0, 1.5, 1.5, 1.0, 1.0, 0.7, 0.7, 0.5, 0.5, 0.35, 0.35, 0.25, 0.25, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05)


def lower_bound(interval: Interval, budget_bytes: float) -> float:
    """Return seconds that the experts of an interval take at least, whichever experts within a budget are on the
    device, and whether cold ones are computed by the CPU or streamed."""
    best = _one_step(interval) if interval.num_steps == 1 else _many_steps(interval, budget_bytes)
    return _within(best, interval.table.bytes, budget_bytes)


def _within(seconds_LN: Floats, size: Floats, budget: float) -> float:
    """Return a bound on the least sum over layers of seconds[l, n_l] with sum(n_l * size_l) within the budget."""
    bytes_LN = size[:, None] * np.arange(seconds_LN.shape[1])

    def dual(price: float) -> float:
        return float((seconds_LN + price * bytes_LN).min(axis=1).sum() - price * budget)

    low, high = 0.0, float((seconds_LN[:, 0] / size).max())
    result = max(dual(low), dual(high))
    # The dual is concave in the price; whatever prices are tried, each value is a bound.
    for _ in range(_PRICE_STEPS):
        left, right = low + 0.382 * (high - low), low + 0.618 * (high - low)
        at_left, at_right = dual(left), dual(right)
        result = max(result, at_left, at_right)
        low, high = (low, right) if at_left > at_right else (left, high)
    return max(result, 0.0)


def _cold_sums(values_LE: Floats) -> Floats:
    """Return the least sum of a layer's values over the experts on the CPU, with n on the device [L, E + 1]."""
    sums = np.zeros((values_LE.shape[0], values_LE.shape[1] + 1))
    np.cumsum(np.sort(values_LE, axis=1), axis=1, out=sums[:, 1:])
    return sums[:, ::-1]


def _balanced(interval: Interval) -> Floats:
    """Return what each layer-step takes at least, whatever is where [S * L], but for the overhead."""
    table = interval.table
    best = np.zeros(interval.num_slots)
    for cpu, device in ((table.cpu_read, table.device_read), (table.cpu_row, table.device_row)):
        # max(cpu, device) is at least any weighted mean of both; with these weights both sides are equally good.
        share = (cpu / (cpu + device))[interval.layer]
        best = np.maximum(best, interval.per_slot(np.minimum((1 - share) * interval.cpu, share * interval.device)))
    return best


def _floors(interval: Interval) -> tuple[Floats, Floats, Floats]:
    """Return what each layer-step takes at least: with all on the device, at all, and its fastest expert on the CPU."""
    table = interval.table
    used = interval.used > 0
    all_hot = np.where(used, interval.all_device + table.device_overhead, 0.0)
    fastest = np.full(interval.num_slots, np.inf)
    np.minimum.at(fastest, interval.slot, interval.cpu)
    fastest[~used] = 0.0
    overhead = min(table.cpu_overhead, table.device_overhead)
    some_cold = np.maximum(table.cpu_overhead + fastest, overhead + _balanced(interval))
    some_cold = np.maximum(some_cold, _whole(interval, fastest))
    # Streaming takes no less than all on the device.
    return all_hot, np.where(used, np.minimum(all_hot, some_cold), 0.0), fastest


def _whole(interval: Interval, fastest: Floats) -> Floats:
    """Return what each layer-step of one token takes at least with experts on the CPU [S * L], 0 for others.

    Its experts take equally long, so that only how many are cold matters; the best whole number is next to where both
    sides would take equally long.
    """
    table, used = interval.table, interval.used
    device = interval.all_device / np.maximum(used, 1)
    level = (table.device_overhead - table.cpu_overhead + interval.all_device) / np.maximum(fastest + device, 1e-30)
    least = np.full(interval.num_slots, np.inf)
    for near in (np.floor(level), np.floor(level) + 1):
        cold = np.clip(near, 1, np.maximum(used, 1))
        on_device = np.where(cold < used, table.device_overhead + (used - cold) * device, 0.0)
        least = np.minimum(least, np.maximum(table.cpu_overhead + cold * fastest, on_device))
    one = np.repeat(interval.tokens == 1, table.shape[0])
    return np.where(one & (used > 0), least, 0.0)


def _one_step(interval: Interval) -> Floats:
    """Return F [L, E + 1] of an interval of one step, where each layer takes one of both ways."""
    table = interval.table
    all_hot, floor, _ = _floors(interval)
    left = np.maximum(interval.used[:, None] - np.arange(table.shape[1] + 1), 0)
    cold = _cold_sums(interval.per_expert(interval.cpu))
    split = np.maximum(np.where(left > 0, cold + table.cpu_overhead, 0.0), floor[:, None])
    stream = np.where(left > 0, table.link_latency + left * table.link[:, None] + interval.largest[:, None], 0.0)
    return np.minimum(split, np.maximum(stream, all_hot[:, None]))


def _many_steps(interval: Interval, budget: float) -> Floats:
    """Return F [L, E + 1] of an interval of several steps: the largest of some functions, each linear in what is cold.

    Every layer-step has several linear bounds, and any mixture of them is one too. An ascent looks for the mixture that
    is highest at the placement that is best by it.
    """
    table, supports = interval.table, _supports(interval)
    constants = np.stack([constant for constant, _ in supports])
    weights = np.stack([weight for _, weight in supports])
    shares = np.full(constants.shape, 1 / len(supports))
    best = _sum_of_steps(interval, _floors(interval)[1])
    for step in _ASCENT:
        mixed = interval.per_expert((shares[:, interval.slot] * weights).sum(axis=0))
        best = np.maximum(best, _sum_of_steps(interval, (shares * constants).sum(axis=0)) + _cold_sums(mixed))
        cold = ~_largest(mixed, table.bytes, budget)[interval.expert]
        values = constants + np.stack([interval.per_slot(cold * weight) for weight in weights])
        ahead = values - (shares * values).sum(axis=0)
        shares = np.maximum(shares + step * ahead / (np.abs(ahead).max() + 1e-30), 0.0)
        shares /= shares.sum(axis=0)
    return best


def _supports(interval: Interval) -> list[tuple[Floats, Floats]]:
    """Return bounds of each layer-step, linear in its cold experts: a constant [S * L], and a weight for each entry.

    They are the CPU's time, a floor and what cold experts add to that at least, and the device's time.
    """
    table = interval.table
    used, link = interval.used > 0, interval.link[interval.slot]
    overhead = min(table.cpu_overhead, table.device_overhead)
    all_hot, floor, fastest = _floors(interval)
    # Where streaming cannot be faster for any cold experts, the CPU's time is a bound; elsewhere the lesser of both is.
    gain = np.full(interval.num_slots, np.inf)
    np.minimum.at(gain, interval.slot, link - interval.cpu)
    never = gain >= table.cpu_overhead
    cpu_weight = np.where(never[interval.slot], interval.cpu, np.minimum(interval.cpu, link))
    cpu_constant = np.where(never, overhead, min(overhead, table.link_latency)) * used
    # A cold set takes overhead + its sum, of which a share (1 - slope) of the fastest already pays for the floor.
    slope = np.where(never & used, 1 - (floor - table.cpu_overhead) / np.where(used, fastest, 1.0), 0.0)
    floor_weight = np.clip(slope, 0.0, 1.0)[interval.slot] * interval.cpu
    # With all cold the device does nothing, and the CPU must take as long as the device's overhead for this to hold.
    slow = used & (table.cpu_overhead + interval.per_slot(interval.cpu) >= table.device_overhead)
    device_constant = np.where(slow, all_hot, 0.0)
    device_weight = np.where(slow[interval.slot], -interval.device, 0.0)
    return [(cpu_constant, cpu_weight), (floor, floor_weight), (device_constant, device_weight)]


def _largest(values_LE: Floats, size: Floats, budget: float) -> np.ndarray:
    """Return which experts have the most value for each byte within a budget [L * E]."""
    sizes = np.repeat(size, values_LE.shape[1])
    order = np.argsort(-values_LE.reshape(-1) / sizes)
    largest = np.zeros(len(order), dtype=np.bool_)
    largest[order[np.cumsum(sizes[order]) <= budget]] = True
    return largest & (values_LE.reshape(-1) > 0)


def _sum_of_steps(interval: Interval, per_slot: Floats) -> Floats:
    sums: Floats = per_slot.reshape(interval.num_steps, -1).sum(axis=0)[:, None]
    return sums
