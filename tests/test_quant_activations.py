"""Activations as int8, row by row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.quant import quantize_rows


def test_halves_go_to_the_even_integer():
    codes, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]
    assert codes.dtype == torch.int8 and scale.tolist() == [[1.0]] and scale.dtype == torch.float32


def test_rows_of_zeros_and_of_tiny_values():
    x = torch.zeros(3, 5)
    x[1, 2] = 2.0**-101
    x[2, 3] = -(2.0**-100)
    codes, scale = quantize_rows(x)
    assert codes.tolist() == [[0] * 5, [0] * 5, [0, 0, 0, -127, 0]]
    assert scale[:2].flatten().tolist() == [0, 0] and scale[2] > 0


@given(seed=st.integers(0, 10**6), rows=st.integers(0, 5), columns=st.integers(1, 140), exponent=st.integers(-60, 60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_values_are_off_by_half_a_step_at_most(seed, rows, columns, exponent):
    x = torch.ldexp(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), torch.tensor(exponent))
    codes, scale = quantize_rows(x)
    assert codes.shape == x.shape and scale.shape == (rows, 1)
    assert ((codes * scale - x).abs() <= scale * 0.5001).all()
    assert (codes.abs().amax(1) == 127).all()
    # A row has the same codes in a batch and alone.
    for row in range(rows):
        alone_codes, alone_scale = quantize_rows(x[row])
        assert torch.equal(alone_codes, codes[row]) and torch.equal(alone_scale, scale[row])


def test_narrow_dtypes_are_widened_first():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        narrow, wide = quantize_rows(x.to(dtype)), quantize_rows(x.to(dtype).float())
        assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])
