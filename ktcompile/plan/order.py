"""Orders of numbers that are the same on every machine."""

from __future__ import annotations

import numpy as np

from ktcompile.plan.table import Floats

_NO_SIGN = np.iinfo(np.int64).max


def ascending(values: Floats) -> np.ndarray:
    """Return the indices that put the last axis of some finite or infinite numbers in order, the lowest first.

    The lower index comes first among equals, and what differs by less than 2^-52 times twice the length of the axis of
    itself may count as equal: the last bits of each number are replaced by its index and the numbers themselves sorted,
    which takes half as long as `argsort` does.
    """
    length = values.shape[-1]
    index_bits = (1 << length.bit_length()) - 1
    keys = np.ascontiguousarray(values, dtype=np.float64).view(np.int64)
    # As whole numbers positive floats are in order, and negative ones the other way round.
    keys = keys ^ ((keys >> 63) & _NO_SIGN)
    keys &= ~index_bits
    keys |= np.arange(length)
    keys.sort(axis=-1)
    keys &= index_bits
    return keys
