"""The expected seconds of a decode step's experts, by how many of them the CPU has on average and how much that varies.

CPU and device wait for each other, so what counts is the expectation of the larger time and not the larger expectation:
the more the number of cold experts varies from step to step, the longer a step takes on average.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ktcompile.plan.cost import Work, layer_cost
from ktcompile.plan.table import ExpertTable, Floats

_POINTS = 257


class StepCurves:
    """The seconds of each layer. touched [L]: experts that a step touches on average. rows: tokens of each of these.

    A step is taken to touch the same number of experts each time, a whole one; fewer than one is the chance of one. No
    cold expert is taken to be streamed in decode.
    """

    def __init__(self, table: ExpertTable, touched: Floats, rows: float) -> None:
        self._touched = np.maximum(touched, 1e-30)[:, None]
        counts = np.maximum(np.round(touched), 1).astype(int)
        self._groups = [_Group(table, np.flatnonzero(counts == n), touched, int(n), rows) for n in np.unique(counts)]

    def at(self, mean_LN: Floats, variance_LN: Floats) -> Floats:
        """Return the seconds [L, N], given the mean and the variance of how many experts are cold [L, N].

        The distribution is a mixture of the narrowest and of a binomial one with that mean.
        """
        share_LN = np.minimum(mean_LN / self._touched, 1.0)
        if len(self._groups) == 1:
            return self._groups[0].at(share_LN, variance_LN)
        result = np.empty_like(share_LN)
        for group in self._groups:
            result[group.layers] = group.at(share_LN[group.layers], variance_LN[group.layers])
        return result


class _Group:
    """Layers of which a step touches the same number of experts."""

    def __init__(self, table: ExpertTable, layers: np.ndarray, touched: Floats, count: int, rows: float) -> None:
        self.layers, self._count = layers, count
        cold = np.arange(count + 1.0)
        # A whole number of experts, which take as long together as their mean number.
        scale = np.maximum(touched[layers, None], 1.0) / count
        cpu, device = (np.maximum(read[layers], rows * row[layers])[:, None] * scale for read, row in table.sides)
        work = Work(
            cold=cold,
            hot=count - cold,
            cpu=cold * cpu,
            device=(count - cold) * device,
            all_device=count * device,
            last=device,
            copy=cold * table.link[layers, None] * scale,
        )
        seconds = layer_cost(table.hardware, work, "split").total * np.minimum(touched[layers, None], 1.0)
        # Points of the curves, and their rise from each to the next.
        self._narrow, self._wide = _with_rises(seconds), _with_rises(seconds @ _binomial(count))

    def at(self, share_LN: Floats, variance_LN: Floats) -> Floats:
        mean = share_LN * self._count
        place = share_LN * (_POINTS - 1)
        narrow, above = _at(self._narrow, mean)
        wide, _ = _at(self._wide, place)
        least = above * (1 - above)
        span = mean * (1 - share_LN)
        span -= least
        part = variance_LN - least
        part /= np.maximum(span, 1e-9, out=span)
        np.minimum(np.maximum(part, 0.0, out=part), 1.0, out=part)
        wide -= narrow
        wide *= part
        wide += narrow
        return wide


def _with_rises(curves: Floats) -> tuple[Floats, Floats]:
    rises = np.zeros_like(curves)
    np.subtract(curves[:, 1:], curves[:, :-1], out=rises[:, :-1])
    return curves, rises


def _at(lines: tuple[Floats, Floats], place_LN: Floats) -> tuple[Floats, Floats]:
    """Return the values of curves [L, points] at places [L, N] from 0 to points - 1, between which they are straight,
    and by how much each place is above the last point."""
    curves, rises = lines
    whole = np.floor(place_LN)
    above = place_LN - whole
    whole += curves.shape[1] * np.arange(float(len(curves)))[:, None]
    point = whole.astype(np.intp)
    values, rise = curves.reshape(-1).take(point), rises.reshape(-1).take(point)
    rise *= above
    values += rise
    return values, above


@cache
def _binomial(count: int) -> Floats:
    """Return the chance of k of `count`, at each of the curves' shares [count + 1, points]."""
    share = np.linspace(0.0, 1.0, _POINTS)
    chances = np.ones((1, _POINTS))
    for _ in range(count):
        chances = np.pad(chances * (1 - share), ((0, 1), (0, 0))) + np.pad(chances * share, ((1, 0), (0, 0)))
    chances.setflags(write=False)
    return chances
