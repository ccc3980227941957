"""Attention over blocks against plain torch. `test_triton_kernels.py` runs this file."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction, relative_error
from helpers.triton_device import DEVICE, in_poison, poisoned
from torch import Tensor

from ktcompile.ops.triton import BlockCache, attention, attention_reference, decode_attention, prefill_attention

FP32 = torch.float32
SCALE = 0.3


def random_cache(
    lengths: list[int], heads: int = 2, size: int = 20, value_size: int | None = None, *, block_size: int = 16,
    dtype: torch.dtype = FP32, latent: bool = False,
) -> BlockCache:  # fmt: skip
    """Return a cache whose blocks are shuffled. All that holds no token is NaN, and no entry past a request's blocks
    names a block. latent: values are the first `value_size` dimensions of the keys."""
    generator = torch.Generator().manual_seed(sum(lengths))
    blocks = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=generator).int()
    table = torch.full((len(lengths), max(blocks, default=0) + 2), -(1 << 20), dtype=torch.int32, device=DEVICE)
    k = poisoned(len(order), block_size, heads, size, dtype=dtype)
    v = k[..., :value_size] if latent else poisoned(len(order), block_size, heads, value_size or size, dtype=dtype)
    begin = 0
    for r, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        table[r, :count] = order[begin : begin + count]
        begin += count
        for t, cache in itertools.product(range(length), (k, v)):
            token = torch.randn(cache.shape[2:], generator=generator)
            cache[table[r, t // block_size], t % block_size] = token.to(DEVICE, dtype)
    return BlockCache(k, v, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))


def queries(count: int, heads: int, size: int, dtype: torch.dtype = FP32) -> Tensor:
    return in_poison(torch.randn(count, heads, size, generator=torch.Generator().manual_seed(count)).to(dtype))


def scale_of(q: Tensor) -> float:
    return 1.3 * q.shape[2] ** -0.5


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32, device=DEVICE).cumsum(0).int()


def reference(q: Tensor, cache: BlockCache, starts: Tensor, **options: Any) -> Tensor:
    cache = replace(cache, block_table=cache.block_table.clamp(min=0))
    return attention_reference.attention(
        q, cache.k, cache.v, cache.block_table, starts, cache.lengths, scale_of(q), **options
    )


def check_decode(q: Tensor, cache: BlockCache, **options: Any) -> Tensor:
    """Return the result of `decode_attention`, after a comparison."""
    got = decode_attention(q, cache, scale_of(q), **options)
    assert_reduction(got, reference(q, cache, starts_of([1] * len(q)), **options))
    return got


def check_prefill(q: Tensor, cache: BlockCache, counts: list[int], **options: Any) -> Tensor:
    """Return the result of `prefill_attention`, after a comparison."""
    got = prefill_attention(q, cache, starts_of(counts), max(counts), scale_of(q), **options)
    assert_reduction(got, reference(q, cache, starts_of(counts), **options))
    return got


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT", 64)


@pytest.mark.parametrize("lengths", [[1], [3, 64, 65, 130], [16]], ids=str)
@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.usefixtures("short_splits")
def test_decode_is_right(lengths: list[int], group: int) -> None:
    check_decode(queries(len(lengths), 2 * group, 20), random_cache(lengths))


@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (16, 24), (64, 64), (72, 40), (192, 128)])
def test_head_sizes(size: int, value_size: int) -> None:
    cache = random_cache([70, 5], 1, size, value_size)
    check_decode(queries(2, 3, size), cache)
    check_prefill(queries(5, 3, size), cache, [3, 2])


def test_values_that_are_part_of_the_keys() -> None:
    for size, value_size in ((36, 32), (576, 512), (40, 24)):
        cache = random_cache([33, 2], 1, size, value_size, latent=True)
        check_decode(queries(2, 18, size), cache)
        check_prefill(queries(4, 2, size), cache, [2, 2])


@pytest.mark.parametrize("window", [1, 7, 64, 100, 1000])
@pytest.mark.usefixtures("short_splits")
def test_windows(window: int) -> None:
    cache = random_cache([150, 3], 1)
    check_decode(queries(2, 2, 20), cache, window=window)
    check_prefill(queries(92, 2, 20), cache, [90, 2], window=window)


def test_keys_before_the_window_are_not_read() -> None:
    cache = random_cache([150], 1, block_size=64)
    cache.k[cache.block_table[0, 0]] = torch.nan
    cache.v[cache.block_table[0, 0]] = torch.nan
    assert decode_attention(queries(1, 2, 20), cache, SCALE, window=80).isfinite().all()
    assert prefill_attention(queries(3, 2, 20), cache, starts_of([3]), 3, SCALE, window=80).isfinite().all()


@pytest.mark.usefixtures("short_splits")
def test_sinks() -> None:
    sinks = torch.tensor([-200.0, -1.0, 0.5, 200.0], device=DEVICE)
    cache = random_cache([100, 2])
    check_decode(queries(2, 4, 20), cache, sinks=sinks)
    check_prefill(queries(5, 4, 20), cache, [4, 1], sinks=sinks)
    check_decode(queries(2, 4, 20), cache, sinks=sinks, window=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes(dtype: torch.dtype) -> None:
    cache, q = random_cache([90, 4], dtype=dtype), queries(2, 4, 20, dtype)
    wanted = reference(q, cache, starts_of([1, 1]))
    for got in (
        decode_attention(q, cache, scale_of(q)),
        prefill_attention(q, cache, starts_of([1, 1]), 1, scale_of(q)),
    ):
        assert got.dtype == dtype and relative_error(got, wanted) < 1.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("block_size", [1, 7, 64, 128])
def test_block_sizes(block_size: int) -> None:
    cache = random_cache([90, 4], block_size=block_size)
    check_decode(queries(2, 4, 20), cache)
    check_prefill(queries(6, 4, 20), cache, [4, 2])


def test_prefill_of_requests_with_and_without_a_past() -> None:
    check_prefill(queries(141, 2, 20), random_cache([70, 131, 1, 9], 1), [70, 65, 1, 5])
    check_prefill(queries(3, 2, 20), random_cache([3, 8, 8], 1), [3, 0, 0])


def test_nothing_to_do() -> None:
    cache = random_cache([], 1)
    assert decode_attention(queries(0, 2, 20), cache, SCALE).shape == (0, 2, 20)
    assert prefill_attention(queries(0, 2, 20), cache, starts_of([]), 0, SCALE).shape == (0, 2, 20)
    padded = decode_attention(queries(2, 2, 20), random_cache([0, 5], 1), SCALE)
    assert_exact(padded[0], torch.zeros_like(padded[0]))


@pytest.mark.parametrize("window", [None, 40, 100])
@pytest.mark.parametrize(("size", "block_size", "dtype"), [(20, 16, FP32), (64, 64, FP32), (64, 64, torch.bfloat16)])
def test_chunks_do_not_change_a_result(window: int | None, size: int, block_size: int, dtype: torch.dtype) -> None:
    cache = random_cache([330], 1, size, block_size=block_size, dtype=dtype)
    q = queries(330, 2, size, dtype)
    whole = prefill_attention(q, cache, starts_of([330]), 330, SCALE, window)
    for begin, end in ((0, 1), (0, 77), (77, 330), (329, 330)):
        prefix = replace(cache, lengths=torch.full_like(cache.lengths, end))
        part = prefill_attention(q[begin:end], prefix, starts_of([end - begin]), end - begin, SCALE, window)
        assert_exact(part, whole[begin:end], f"[{begin}, {end})")


@pytest.mark.usefixtures("short_splits")
def test_other_requests_do_not_change_a_result() -> None:
    cache, q = random_cache([130, 3, 70]), queries(3, 4, 20)
    together = decode_attention(q, cache, SCALE)
    for r in range(3):
        alone = replace(cache, block_table=cache.block_table[r : r + 1], lengths=cache.lengths[r : r + 1])
        assert_exact(decode_attention(q[r : r + 1], alone, SCALE, max_length=130), together[r : r + 1])


def test_what_does_not_fit_is_refused() -> None:
    cache, q = random_cache([5, 9]), queries(2, 4, 20)
    for query, held, options, message in (
        (q[:, :3], cache, {}, r"q is \[2, 3, 20\]"),
        (q[..., 1:], cache, {}, r"q is \[2, 4, 19\]"),
        (q.half(), cache, {}, "q is torch.float16, k is torch.float32"),
        (q, replace(cache, v=cache.v[:, 1:]), {}, "k and v of the cache"),
        (q, replace(cache, lengths=cache.lengths[1:]), {}, "lengths"),
        (q, replace(cache, block_table=cache.block_table.long()), {}, "int32"),
        (q, cache, {"window": 0}, "window is 0"),
        (q, cache, {"sinks": torch.zeros(3)}, r"sinks is \[3\]; it must be \[4\]"),
        (q[:1], cache, {}, "one for each of 2 requests"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(query, held, SCALE, **options)
    with pytest.raises(ValueError, match="scale is 0"):
        decode_attention(q, cache, 0)
    with pytest.raises(ValueError, match="starts"):
        prefill_attention(q, cache, starts_of([2]), 2, SCALE)
    with pytest.raises(ValueError, match="max_queries is 3"):
        prefill_attention(q, cache, starts_of([1, 1]), 3, SCALE)
