"""Orders of numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.plan.order import ascending


@given(st.lists(st.sampled_from([-1e6, -2.5, -1.0, -0.5, 0.0, 1e-9, 0.5, 1.0, 1e30, np.inf]), max_size=300))
def test_the_lower_index_comes_first_among_equals(values):
    numbers = np.array(values, dtype=np.float64)
    assert ascending(numbers).tolist() == np.argsort(numbers, kind="stable").tolist()


@pytest.mark.parametrize("shape", [(3, 1), (5, 128), (2, 257), (15616,)])
def test_every_row_is_in_order(shape):
    values = np.random.default_rng(0).standard_normal(shape)
    before = values.copy()
    assert (ascending(values) == np.argsort(values, axis=-1)).all()
    assert (values == before).all()
