"""Rotary embedding and the store of keys and values against plain torch. `test_triton_kernels.py` runs this file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction, relative_error
from helpers.triton_device import DEVICE, in_poison, poisoned
from torch import Tensor

from ktcompile.ops.triton import Rotary, attention_reference, store_kv

BLOCKS, BLOCK_SIZE, POSITIONS = 4, 6, 50
SLOTS = [7, 0, -1, 23, 8, 2]


def rotary(count: int, begin: int = 0, *, interleaved: bool = False) -> Rotary:
    angles = torch.arange(POSITIONS)[:, None] * 10.0 ** -torch.linspace(0, 2, count)[None, :]
    return Rotary(angles.cos().to(DEVICE), angles.sin().to(DEVICE), begin, interleaved)


class Case:
    """Random queries, keys and values, in memory that is NaN elsewhere, and empty caches."""

    def __init__(self, tokens: int = 6, heads: int = 3, kv_heads: int = 2, size: int = 20, value_size: int = 12,
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(tokens)

        def normal(*shape: int) -> Tensor:
            return in_poison(torch.randn(shape, generator=generator).to(dtype))

        self.q, self.k = normal(tokens, heads, size), normal(tokens, kv_heads, size)
        self.v = normal(tokens, kv_heads, value_size)
        self.positions = torch.randint(0, POSITIONS, (tokens,), generator=generator).to(DEVICE)
        self.slots = torch.tensor(SLOTS[:tokens], dtype=torch.int64, device=DEVICE)
        self.k_cache = poisoned(BLOCKS, BLOCK_SIZE, kv_heads, size, dtype=dtype)
        self.v_cache = poisoned(BLOCKS, BLOCK_SIZE, kv_heads, value_size, dtype=dtype)

    def run(self, embedding: Rotary, *, values: bool = True) -> Tensor:
        v, v_cache = (self.v, self.v_cache) if values else (None, None)
        return store_kv(self.q, self.k, v, self.positions, self.slots, self.k_cache, v_cache, embedding)

    def rotated(self, x: Tensor, embedding: Rotary) -> Tensor:
        cos, sin = embedding.cos[self.positions], embedding.sin[self.positions]
        return attention_reference.rotate(x, cos, sin, embedding.begin, embedding.interleaved)

    def check(self, embedding: Rotary) -> None:
        """Fail unless q is rotated, and every slot holds what it must: its token, or what was there."""
        assert_reduction(self.run(embedding), self.rotated(self.q, embedding))
        kept = (self.slots >= 0).nonzero().flatten()
        held = self.k_cache.flatten(0, 1)[self.slots[kept]]
        assert_reduction(held, self.rotated(self.k, embedding)[kept])
        wanted = torch.full_like(self.v_cache, torch.nan)
        wanted.view(-1, *wanted.shape[2:])[self.slots[kept]] = self.v[kept]
        assert_exact(self.v_cache, wanted)
        assert int(self.k_cache.isfinite().sum()) == held.numel()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("count", "begin"), [(10, 0), (3, 0), (4, 12), (5, 3)])
def test_all_or_some_dimensions_are_rotated(count: int, begin: int, interleaved: bool) -> None:
    Case().check(rotary(count, begin, interleaved=interleaved))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 1), (3, 70, 1, 20, 20), (2, 4, 4, 128, 128), (2, 3, 3, 192, 128)])
def test_sizes(shape: tuple[int, int, int, int, int]) -> None:
    Case(*shape).check(rotary(shape[3] // 2))


def test_without_rotation_numbers_are_copied() -> None:
    case = Case(dtype=torch.bfloat16)
    assert_exact(case.run(rotary(0)), case.q.contiguous())
    assert_exact(case.k_cache.flatten(0, 1)[case.slots[0]], case.k[0].contiguous())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes(dtype: torch.dtype) -> None:
    case, embedding = Case(dtype=dtype), rotary(10)
    got = case.run(embedding)
    assert got.dtype == dtype and relative_error(got, case.rotated(case.q, embedding)) < torch.finfo(dtype).eps / 2


def test_values_that_are_part_of_the_keys() -> None:
    case, embedding = Case(kv_heads=1), rotary(4, 12)
    case.run(embedding, values=False)
    assert_reduction(case.k_cache.flatten(0, 1)[case.slots[0]], case.rotated(case.k, embedding)[0])
    assert case.v_cache.isnan().all()


def test_no_tokens() -> None:
    case = Case(tokens=0)
    assert case.run(rotary(10)).shape == (0, 3, 20)
    assert case.k_cache.isnan().all()


def test_integers_may_be_of_32_bits() -> None:
    case = Case()
    case.positions, case.slots = case.positions.int(), case.slots.int()
    case.check(rotary(10))


def test_what_does_not_fit_is_refused() -> None:
    for name, value, message in (
        ("q", torch.zeros(5, 3, 20), r"q is \[5, 3, 20\] and k is \[6, 2, 20\]"),
        ("k", torch.zeros(6, 2, 20).half(), "k is torch.float16"),
        ("v", torch.zeros(6, 1, 12), r"v is \[6, 1, 12\]"),
        ("v", None, "both be None"),
        ("k_cache", torch.zeros(4, 6, 3, 20), r"k_cache is \[4, 6, 3, 20\]"),
        ("v_cache", torch.zeros(4, 6, 2, 11), r"v_cache is \[4, 6, 2, 11\]"),
        ("positions", torch.zeros(5).int(), "positions"),
        ("slots", torch.zeros(6), "slot_mapping"),
        ("q", torch.zeros(6, 20, 3).mT, "contiguous"),
    ):
        case = Case()
        setattr(case, name, None if value is None else value.to(DEVICE))
        with pytest.raises(ValueError, match=message):
            case.run(rotary(10))
    with pytest.raises(ValueError, match="12 to 22 are to be rotated, but a head has 20"):
        Case().run(rotary(5, 12))
    with pytest.raises(ValueError, match="cos is"):
        Case().run(replace(rotary(5), cos=rotary(4).cos))
