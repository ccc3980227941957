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
    """The seconds of each layer. touched [L]: experts that a step touches. rows: tokens of each of these.

    A step is taken to touch the same number of experts each time, a whole one.
    """

    def __init__(self, table: ExpertTable, touched: Floats, rows: float) -> None:
        self._touched = touched
        self._counts = np.maximum(np.round(touched), 1).astype(int)
        self._groups = [
            (int(count), _by_count(table, self._counts == count, touched, rows)) for count in np.unique(self._counts)
        ]

    def at(self, mean_LN: Floats, variance_LN: Floats) -> Floats:
        """Return the seconds [L, N], given the mean and the variance of how many experts are cold [L, N].

        The distribution is a mixture of the narrowest and of a binomial one with that mean.
        """
        result = np.empty_like(mean_LN)
        share_LN = np.clip(mean_LN / np.maximum(self._touched[:, None], 1e-30), 0.0, 1.0)
        for count, seconds in self._groups:
            layers = self._counts == count
            share = share_LN[layers]
            mean = share * count
            least = (mean - np.floor(mean)) * (np.floor(mean) + 1 - mean)
            most = mean * (1 - share)
            part = np.clip((variance_LN[layers] - least) / np.maximum(most - least, 1e-9), 0.0, 1.0)
            narrow, wide = _at(seconds, share), _at(seconds @ _binomial(count), share)
            result[layers] = narrow + part * (wide - narrow)
        return result


def _by_count(table: ExpertTable, layers: np.ndarray, touched: Floats, rows: float) -> Floats:
    """Return the seconds of some layers with 0, 1, ... of all touched experts on the CPU [layers, count + 1]."""
    count = max(round(float(touched[layers][0])), 1)
    cold = np.arange(count + 1.0)
    # A whole number of experts, which take as long together as their mean number.
    scale = (touched[layers] / count)[:, None]
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
    return layer_cost(table.hardware, work).total


def _at(curves: Floats, share_LN: Floats) -> Floats:
    """Return the values of curves over 0 to 1 [L, points], between whose points they are straight, at shares [L, N]."""
    place = share_LN * (curves.shape[1] - 1)
    left = np.minimum(place.astype(np.int64), curves.shape[1] - 2)
    low, high = (np.take_along_axis(curves, index, axis=1) for index in (left, left + 1))
    values: Floats = low + (place - left) * (high - low)
    return values


@cache
def _binomial(count: int) -> Floats:
    """Return the chance of k of `count`, at each of the curves' shares [count + 1, points]."""
    share = np.linspace(0.0, 1.0, _POINTS)
    chances = np.ones((1, _POINTS))
    for _ in range(count):
        chances = np.pad(chances * (1 - share), ((0, 1), (0, 0))) + np.pad(chances * share, ((1, 0), (0, 0)))
    chances.setflags(write=False)
    return chances
