"""What steps are expected to take under some traffic, by which experts are on the device."""

from __future__ import annotations

import numpy as np

from ktcompile.plan.cost import Work, layer_seconds
from ktcompile.plan.demand import Demand
from ktcompile.plan.order import ascending
from ktcompile.plan.step_curves import StepCurves
from ktcompile.plan.table import ExpertTable, Floats, Mask

# How many of a layer's experts may be left to the CPU for being used by most steps, and which share of a step this must
# save.
_PINNED = (0, 1, 2, 3, 4, 6, 8)
_WORTH_PINNING = 0.002
# Shares of the other experts that are tried beside them.
_TRIED = np.linspace(0.0, 1.0, 25) ** 2
# They are looked for where so many times the room would be too much.
_SOON = 1.25
# More seconds than any expert saves.
_LAST = 1e6


class Outlook:
    """The expected seconds of a model's experts for each decode step, prefills shared out among them.

    In decode CPU and device wait for each other, and how many experts are cold varies; a prefill costs what its mean
    does. savings [L, E]: the CPU's seconds that go if an expert moves to the device.
    """

    def __init__(self, table: ExpertTable, demand: Demand) -> None:
        self.table, self._prefills, self._experts = table, demand.prefills, table.exists.sum(axis=1)
        touches = demand.touches
        if not touches.any():
            # Experts that nothing is known of are equally likely, if ever so little.
            touches = np.where(table.exists, 1e-12, 0.0)
        self._touches = touches
        # What each expert adds to its layer if it is cold.
        self._each = each = np.empty((5 if self._prefills else 2, *table.shape))
        each[0] = touches
        np.multiply(touches, touches, out=each[1])
        self.savings = touches * np.maximum(table.cpu_read, demand.touch_rows * table.cpu_row)[:, None]
        if self._prefills:
            rows = demand.prefill_rows
            used, cpu, device = each[2:]
            np.subtract(1.0, np.exp(-rows.astype(np.float32)), out=used)
            np.multiply(used, table.cpu_seconds(rows), out=cpu)
            np.multiply(used, table.device_seconds(rows), out=device)
            self.savings += self._prefills * np.minimum(cpu, used * table.link[:, None])
            self._last = device.max(axis=1, keepdims=True)
        self._all = each.sum(axis=2, keepdims=True)
        self._curves = StepCurves(table, self._all[0, :, 0], demand.touch_rows)

    def layer_seconds(self, order_LE: np.ndarray) -> Floats:
        """Return a layer's seconds with its first n experts on the device [L, E + 1].

        order [L, E]: ids, the first to go to the device first. What prefills take, where both sides' work is a sum over
        many experts, is computed for some of many n, and lies on straight lines between.
        """
        seconds = self._decode_seconds(self._cold_sums(order_LE, self._each[:2]))
        if self._prefills:
            every = _stride(order_LE.shape[1])
            prefill = self._prefill_seconds(self._cold_sums(order_LE, self._each[2:], every))
            rises = (prefill[:, 1:] - prefill[:, :-1])[:, :, None] * (np.arange(every) / every)
            rises += prefill[:, :-1, None]
            seconds[:, :-1] += rises.reshape(len(rises), -1)
            seconds[:, -1] += prefill[:, -1]
        return seconds

    def step_seconds(self, *resident_LE: Mask) -> tuple[float, ...]:
        """Return the seconds of all layers for each of some placements, masks of what is on the device [L, E]."""
        cold = np.stack([np.einsum("qle,le->ql", self._each, 1.0 - mask) for mask in resident_LE], axis=2)
        return tuple(self._seconds(cold).sum(axis=0).tolist())

    def marginal_savings(
        self, budget_bytes: float = 0.0, resident_LE: Mask | None = None, ahead: Floats | float = 0.0
    ) -> Floats:
        """Return by how much an expert speeds its layer up if it comes to the device after all that save more [L, E].

        It is by how much `layer_seconds` falls, so that where the device is the slower side already, or soon would be,
        an expert saves little, or costs: then it is negative. Within a layer it never rises from one expert to the
        next, and what is taken in this order saves at least as much as the sum says. With a budget, experts
        that are best left to the CPU although most steps use them (`steadying`) come last. resident: what is on the
        device now. ahead [L, E]: seconds that an expert is put ahead of others in its layer's order.
        """
        order = self._order(ahead)
        seconds = self.layer_seconds(order)
        # Somewhere the device would soon be the slower side if it had more than there is room for.
        if (np.argmin(seconds, axis=1) < np.minimum(_SOON * self._room(budget_bytes), self._experts)).any():
            pinned = self.steadying(budget_bytes, resident_LE)
            if pinned.any():
                order = self._order(ahead - _LAST * pinned.astype(np.float64))
                seconds = self.layer_seconds(order)
        gains = np.minimum.accumulate(seconds[:, :-1] - seconds[:, 1:], axis=1)
        # What differs by rounding is no gain.
        gains *= np.abs(gains) > 1e-12 * seconds[:, :1]
        # Equal gains must be taken in the layer's order too.
        gains -= np.abs(gains) * (1e-9 * np.arange(gains.shape[1]))
        result = np.empty_like(gains)
        result.reshape(-1)[self._flat(order)] = gains
        result *= self.table.exists
        return result

    def steadying(self, budget_bytes: float, resident_LE: Mask | None = None) -> Mask:
        """Return the experts [L, E] that are best left to the CPU although most steps use them.

        Where the device is the slower side and has room, the CPU should have a share of each step. A few experts that
        nearly all steps use give it a steadier share than many that are seldom used. Experts on the device must be
        used by a quarter more to be chosen.
        """
        table = self.table
        experts, room = self._experts, self._room(budget_bytes)
        rank = self._touches if resident_LE is None else self._touches * np.where(resident_LE, 0.8, 1.0)
        popular = ascending(-rank)
        unpopular = self._cold_sums(self._order(0.0), self._each)[:, :, ::-1]
        best, chosen = np.full(len(room), np.inf), np.zeros(len(room), dtype=int)
        for count in _PINNED:
            # Beside the most popular ones a number of the least popular ones are cold, as the budget wants, or more.
            first = np.clip(experts - room - count, 0, experts)[:, None]
            others = (first + (np.maximum(experts - count, 0)[:, None] - first) * _TRIED).astype(np.intp)
            sums = np.take_along_axis(unpopular, others[None], axis=2)
            sums = sums + np.take_along_axis(self._each, popular[None, :, :count], axis=2).sum(axis=2, keepdims=True)
            least = self._seconds(sums).min(axis=1)
            better = least < best * (1 - _WORTH_PINNING)
            chosen[better], best[better] = count, least[better]
        pinned = np.zeros(table.shape, dtype=np.bool_)
        np.put_along_axis(pinned, popular, np.arange(table.shape[1]) < chosen[:, None], axis=1)
        return pinned & table.exists

    def _room(self, budget_bytes: float) -> np.ndarray:
        """Return how many experts of each layer there is room for, if all have the same share on the device."""
        share = min(budget_bytes / float((self._experts * self.table.bytes).sum()), 1.0)
        room: np.ndarray = np.floor(share * self._experts + 1e-9)
        return room

    def _order(self, ahead: Floats | float) -> np.ndarray:
        worst_last = -self.savings
        worst_last -= ahead
        if not self.table.exists.all():
            worst_last[~self.table.exists] = np.inf
        return ascending(worst_last)

    def _flat(self, order_LE: np.ndarray) -> np.ndarray:
        """Return the flat indices `layer * E + expert` of an order."""
        layers, experts = order_LE.shape
        flat: np.ndarray = order_LE + experts * np.arange(layers)[:, None]
        return flat

    def _cold_sums(self, order_LE: np.ndarray, each: Floats, every: int = 1) -> Floats:
        """Return the sums over all experts but the first n of an order [..., L, E / every + 1], for every so many n."""
        layers, experts = order_LE.shape
        sums = np.zeros((len(each), layers, experts // every + 1))
        last_first = np.ascontiguousarray(self._flat(order_LE)[:, ::-1])
        for values, sums_LN in zip(each, sums, strict=True):
            parts = values.reshape(-1).take(last_first)
            if every > 1:
                parts = np.einsum("lne->ln", parts.reshape(layers, -1, every))
            np.cumsum(parts, axis=1, out=sums_LN[:, 1:])
        return sums[:, :, ::-1]

    def _seconds(self, cold: Floats) -> Floats:
        """Return the seconds of each layer [L, N], given the sums over its cold experts [..., L, N]."""
        seconds = self._decode_seconds(cold[:2])
        if self._prefills:
            seconds += self._prefill_seconds(cold[2:])
        return seconds

    def _decode_seconds(self, cold: Floats) -> Floats:
        # Independent touches would vary by the sum of t (1 - t) on each side; that both sides' add up to a fixed number
        # leaves this of it.
        own = np.maximum(cold[0] - cold[1], 0.0)
        other = np.maximum((self._all[0] - self._all[1]) - own, 0.0)
        both = np.maximum(own + other, 1e-30)
        own *= other
        own /= both
        return self._curves.at(cold[0], own)

    def _prefill_seconds(self, cold: Floats) -> Floats:
        """Return the share of each layer's prefills in a decode step [L, N]."""
        used, cpu, device = cold
        all_used, _, all_device = self._all[2:]
        work = Work(
            cold=used,
            hot=all_used - used,
            cpu=cpu,
            device=all_device - device,
            all_device=all_device,
            last=self._last,
            copy=used * self.table.link[:, None],
        )
        result: Floats = self._prefills * layer_seconds(self.table.hardware, work)
        return result


def _stride(experts: int) -> int:
    """Return a divisor of the number of experts that leaves at least 32 parts, or 1."""
    return max(every for every in (1, 2, 4, 8) if every == 1 or (experts % every == 0 and experts >= 32 * every))
