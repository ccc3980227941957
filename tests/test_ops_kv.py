"""Keys and values in int8: `kt::store_kv` against its definition, and attention over codes against that over fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.attention import DTYPES, Inputs, Shape, in_blocks, poison, poisoned, random_inputs
from helpers.compare import assert_exact, assert_reduction, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ktcompile.machine import machine
from ktcompile.ops import attention, paged_attention
from ktcompile.ops import attention_reference as reference
from ktcompile.ops.kv import KV_FORMATS, KVFormat, PagedKV, store_kv

ISAS = machine().isas
CAUSAL = {"causal": True}
RULES: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": CAUSAL,
    "window": {"causal": True, "window": 37},
    "softcap": {"causal": True, "softcap": 5.0, "scale": 0.7},
    "sinks": {"causal": True, "window": 70, "sinks": torch.tensor([0.3, -2.0, 4.0, 80.0])},
    "lengths": {"causal": True, "lengths": torch.tensor([40, 70])},
    "mask": {"mask": torch.rand(5, 70, generator=torch.Generator().manual_seed(0)) < 0.6},
}
# Sizes of keys and of values, and their numbers of scales.
SIZES = (
    ((16, 16), (1, 1)),
    ((32, 64), (2, 1)),
    ((128, 128), (2, 4)),
    ((192, 128), (3, 1)),
    ((576, 512), (9, 8)),
    ((80, 36), (5, 1)),
    ((9, 3), (1, 1)),
    ((6, 5), (1, 1)),
)


def quantized(inputs: Inputs, groups: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Return poisoned codes of keys and of values, and their scales, as arguments."""
    key, key_scales = map(poisoned, reference.quantize(inputs.key, groups[0]))
    value, value_scales = map(poisoned, reference.quantize(inputs.value, groups[1]))
    return (key, value), {"key_scales": key_scales, "value_scales": value_scales}


def in_fp32(codes: tuple[Tensor, Tensor], scales: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the keys and values that codes with scales are."""
    key, value = codes
    return reference.dequantize(key, scales["key_scales"]), reference.dequantize(value, scales["value_scales"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("sizes", "groups"), SIZES, ids=str)
def test_codes_give_the_bits_of_the_numbers_that_they_are(
    sizes: tuple[int, int], groups: tuple[int, int], isa: str
) -> None:
    for dtype in DTYPES:
        for queries, positions in ((1, 65), (7, 130)):
            inputs = random_inputs(Shape(2, 4, 2, queries, positions, *sizes), dtype)
            codes, scales = quantized(inputs, groups)
            got = attention(inputs.query, *codes, **CAUSAL, **scales, isa=isa)
            numbers = in_fp32(codes, scales)
            assert_exact(got, attention(inputs.query, *numbers, **CAUSAL), f"{dtype}, {queries} queries")
            assert_reduction(got, reference.attention(inputs.query, *numbers, **CAUSAL), str(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, isa: str) -> None:
    inputs = random_inputs(Shape(key_size=64, value_size=48))
    codes, scales = quantized(inputs, (4, 3))
    got = attention(inputs.query, *codes, **RULES[rule], **scales, isa=isa)
    numbers = in_fp32(codes, scales)
    assert_exact(got, attention(inputs.query, *numbers, **RULES[rule]))
    assert_reduction(got, reference.attention(inputs.query, *numbers, **RULES[rule]))


def test_bits_do_not_depend_on_batch_chunks_and_threads(threads: Any) -> None:
    inputs = random_inputs(Shape(3, 4, 2, 330, 330, 64, 64), torch.bfloat16)
    codes, scales = quantized(inputs, (1, 1))
    threads(1)
    whole = attention(inputs.query, *codes, **CAUSAL, **scales)
    for count in (2, 5):
        threads(count)
        assert_exact(attention(inputs.query, *codes, **CAUSAL, **scales), whole, f"{count} threads")
    alone = [x[1:2] for x in (inputs.query, *codes)]
    alone_scales = {name: x[1:2] for name, x in scales.items()}
    assert_exact(attention(*alone, **CAUSAL, **alone_scales), whole[1:2], "alone")
    query, key, value = alone
    for size in (1, 100):
        for begin in range(0, 330, size):
            end = min(begin + size, 330)
            seen = {name: x[:, :, :end] for name, x in alone_scales.items()}
            part = attention(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], **CAUSAL, **seen)
            assert_exact(part, whole[1:2, :, begin:end], f"queries from {begin} on, {size} at a time")


@pytest.mark.parametrize("isa", ISAS)
def test_scales_of_what_is_masked_may_hold_anything(isa: str) -> None:
    inputs = random_inputs(Shape(positions=135, key_size=32, value_size=32))
    codes, scales = quantized(inputs, (1, 2))
    seen = torch.rand(135, generator=torch.Generator().manual_seed(1)) < 0.8
    wanted = attention(inputs.query, *codes, mask=seen, **scales, isa=isa)
    for bad in (torch.nan, torch.inf, 3e38):
        for x in scales.values():
            x[:, :, ~seen] = bad
        assert_exact(attention(inputs.query, *codes, mask=seen, **scales, isa=isa), wanted, str(bad))


def test_a_row_that_is_not_finite_spreads_to_those_who_see_it() -> None:
    inputs = random_inputs(Shape(queries=9, positions=9))
    inputs.value[0, 0, 4, 3] = torch.inf
    inputs.key[1, 1, 6] = torch.nan
    codes, scales = quantized(inputs, (1, 1))
    got = attention(inputs.query, *codes, **CAUSAL, **scales)
    assert got[0, :2, 4:].isnan().all() and got[1, 2:, 6:].isnan().all()
    assert got[0, :, :4].isfinite().all() and got[0, 2:].isfinite().all() and got[1, 2:, :6].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "groups"), [(128, 1), (128, 2), (576, 9), (48, 3), (37, 1), (9, 1), (1, 1)])
def test_stored_rows_are_those_of_the_definition(size: int, groups: int, dtype: torch.dtype) -> None:
    """And nothing else is written. 700 tokens are cut among threads."""
    generator = torch.Generator().manual_seed(size)
    for tokens in (1, 3, 700):
        rows = torch.randn(tokens, 2, size, generator=generator) * torch.randn(tokens, 2, 1, generator=generator).exp()
        rows[0, 0] = 0
        rows[-1, 1] = 1e-30
        if tokens > 1:
            rows[1, 1, size // 2] = torch.nan
            rows[2, 0, 0] = torch.inf
        rows = poisoned(rows.to(dtype))
        codes = poisoned(torch.full((tokens, 16, 2, size), -128, dtype=torch.int8))
        scales = poisoned(torch.full((tokens, 16, 2, groups), torch.nan))
        slots = torch.randperm(tokens * 16, generator=generator)[:tokens]
        slots[tokens // 2] = slots[tokens // 2] if tokens < 3 else -1
        store_kv(rows, slots, codes, scales)
        wanted_codes, wanted_scales = reference.quantize(rows, groups)
        expected_codes, expected_scales = torch.full_like(codes, -128), torch.full_like(scales, torch.nan)
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected_codes[slot // 16, slot % 16] = wanted_codes[t]
                expected_scales[slot // 16, slot % 16] = wanted_scales[t]
        assert torch.equal(codes, expected_codes)
        assert_exact(scales, expected_scales)
        for x in (codes, scales):
            assert x._base is not None
            untouched = x._base.clone()
            untouched[..., 1:-2, 2:-3] = poison(x.dtype)
            assert untouched.isnan().all() if x.dtype.is_floating_point else (untouched == -128).all()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_stored_in_blocks_gives_the_bits_of_rows_in_order(data: st.DataObject) -> None:
    """Tokens come in chunks of any size, the sequences' blocks in any order."""
    kv_format = data.draw(st.sampled_from(list(KV_FORMATS.values())))
    block_size = data.draw(st.sampled_from([1, 3, 16, 64]))
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3))
    queries = [data.draw(st.integers(0, min(length, 40))) for length in lengths]
    chunk = data.draw(st.integers(1, 200))
    window = data.draw(st.sampled_from([None, 50]))
    dtype = data.draw(st.sampled_from(DTYPES))
    width = -(-max(lengths) // block_size)
    table = torch.randperm(len(lengths) * width).reshape(len(lengths), width).to(torch.int32)
    query, key, value = random_inputs(Shape(len(lengths), 4, 2, max(lengths), max(lengths), 64, 20), dtype)
    kv = PagedKV.empty(kv_format, int(table.max()) + 1, block_size, 2, 64, 20)
    for b, length in enumerate(lengths):
        for begin in range(0, length, chunk):
            at = torch.arange(begin, min(begin + chunk, length))
            slots = table[b, at // block_size].long() * block_size + at % block_size
            kv.store(key[b, :, at].transpose(0, 1), value[b, :, at].transpose(0, 1), slots)
    parts = [query[b, :, length - q : length] for b, (length, q) in enumerate(zip(lengths, queries, strict=True))]
    got = kv.attention(
        torch.cat(parts, 1).transpose(0, 1),
        table,
        torch.tensor(lengths),
        torch.tensor([0, *queries]).cumsum(0),
        window=window,
    )
    for b, (length, q) in enumerate(zip(lengths, queries, strict=True)):
        rows = [as_stored(kv_format, x[b : b + 1, :, :length]) for x in (key, value)]
        wanted = attention(parts[b][None], *rows, causal=True, window=window)
        assert_exact(got[sum(queries[:b]) :][:q].transpose(0, 1)[None], wanted, f"sequence {b}")


def as_stored(kv_format: KVFormat, rows: Tensor) -> Tensor:
    groups = kv_format.groups(rows.shape[-1])
    return reference.dequantize(*reference.quantize(rows, groups)) if groups else rows.to(kv_format.dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_latents_are_keys_and_values_at_once(isa: str) -> None:
    latents = torch.randn(37, 1, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    kv = PagedKV.empty_latents(KV_FORMATS["int8"], 4, 16, 576, 512)
    slots = torch.cat([torch.arange(48, 64), torch.arange(0, 16), torch.arange(32, 37)])
    kv.store(latents, None, slots)
    table, lengths = torch.tensor([[3, 0, 2]], dtype=torch.int32), torch.tensor([37])
    query = torch.randn(2, 8, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = kv.attention(query, table, lengths, torch.tensor([0, 2]), isa=isa)
    numbers = as_stored(KV_FORMATS["int8"], latents).transpose(0, 1)[None]
    wanted = attention(query.transpose(0, 1)[None], numbers, numbers[..., :512], causal=True)
    assert_exact(got.transpose(0, 1)[None], wanted)


def test_an_expanded_scale_and_any_order_of_dimensions() -> None:
    inputs = random_inputs(Shape(key_size=32, value_size=32))
    (key, value), scales = quantized(inputs, (2, 2))
    scales["value_scales"] = torch.tensor(0.02).expand_as(scales["value_scales"])
    wanted = attention(inputs.query, key, value, **scales)
    tokens_first = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in scales.items()}
    columns_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (key, value)]
    assert_exact(attention(inputs.query, *columns_first, **tokens_first), wanted)


@pytest.mark.parametrize(
    ("outliers", "bounds"),
    [(1.0, {"int8": 0.009, "int8_g32": 0.008}), (12.0, {"int8": 0.045, "int8_g32": 0.035})],
    ids=["gaussian", "outliers"],
)
def test_the_error_of_int8(outliers: float, bounds: dict[str, float]) -> None:
    """Three of 128 channels of keys are larger by a factor, for which queries are smaller."""
    query, key, value = random_inputs(Shape(1, 8, 2, 64, 512, 128, 128))
    key[..., [5, 40, 77]] *= outliers
    query[..., [5, 40, 77]] /= outliers
    wanted = reference.attention(query, key, value, **CAUSAL)
    for name, bound in bounds.items():
        stored = [as_stored(KV_FORMATS[name], x) for x in (key, value)]
        error = relative_error(attention(query, *stored, **CAUSAL), wanted)
        assert bound / 4 < error < bound, name


def test_bytes_of_rows() -> None:
    assert [f.row_bytes(128) for f in KV_FORMATS.values()] == [512, 256, 256, 128 + 8, 128 + 16]
    assert KV_FORMATS["int8"].row_bytes(80) == 84


def test_opcheck() -> None:
    inputs = random_inputs(Shape())
    codes, scales = quantized(inputs, (1, 1))
    rest = (None, torch.randn(4), None, True, None, None, None, None, None, *scales.values())
    torch.library.opcheck(torch.ops.kt.attention.default, (inputs.query, *codes, *rest))
    storage = torch.zeros(2, 16, 2, 8, dtype=torch.int8), torch.zeros(2, 16, 2, 1)
    torch.library.opcheck(torch.ops.kt.store_kv.default, (torch.randn(3, 2, 8), torch.tensor([4, 30, -1]), *storage))


SCALES = torch.ones(2, 2, 70, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_scales": None}, "key has dtype torch.int8; it needs scales"),
        ({"value": torch.zeros(2, 2, 70, 32)}, "key has dtype torch.int8 and value torch.float32"),
        ({"query": torch.zeros(2, 4, 5, 32, dtype=torch.int8)}, "query has dtype torch.int8"),
        ({"value_scales": SCALES[:, :, :69]}, r"the scales of value are \[2, 2, 69, 1\]"),
        ({"value_scales": SCALES.half()}, "torch.float16"),
        ({"key_scales": SCALES.expand(2, 2, 70, 4)}, "rows of 32 elements and 4 scales"),
        ({"key_scales": SCALES[..., :0]}, "and 0 scales"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    codes = torch.zeros(2, 2, 70, 32, dtype=torch.int8)
    arguments = {
        "query": torch.zeros(2, 4, 5, 32),
        "key": codes,
        "value": codes,
        "key_scales": SCALES,
        "value_scales": SCALES,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_scales_of_numbers_are_refused() -> None:
    inputs = random_inputs(Shape())
    with pytest.raises(ValueError, match=r"key has scales and dtype torch.float32"):
        attention(*inputs, key_scales=torch.ones(2, 2, 70, 1))
    blocks = torch.zeros(4, 16, 2, 8, dtype=torch.int8)
    table, starts = torch.tensor([[1, 3]], dtype=torch.int32), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"key_blocks has dtype .*; it needs scales"):
        paged_attention(torch.zeros(3, 4, 8), blocks, blocks, table, torch.tensor([20]), starts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.tensor([0, 32])}, "slot_mapping has 32; it must be below 32"),
        ({"slots": torch.tensor([0])}, r"slot_mapping is \[1\]"),
        ({"slots": torch.tensor([0, 1], dtype=torch.int32)}, "torch.int32"),
        ({"rows": torch.zeros(2, 3, 8)}, r"rows are \[2, 3, 8\]"),
        ({"rows": torch.zeros(2, 2, 8).double()}, "torch.float64"),
        ({"scales": None}, "needs scales"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rows_that_cannot_be_stored_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "rows": torch.zeros(2, 2, 8),
        "slots": torch.tensor([3, 4]),
        "blocks": torch.zeros(2, 16, 2, 8, dtype=torch.int8),
        "scales": torch.zeros(2, 16, 2, 1),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        store_kv(*arguments.values())


def test_values_that_end_inside_of_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="a scale for each 64 elements of a key; values are 96"):
        PagedKV.empty_latents(KV_FORMATS["int8"], 4, 16, 128, 96)


def test_blocks_of_codes_are_poisoned() -> None:
    codes = torch.zeros(1, 1, 5, 4, dtype=torch.int8)
    blocks = in_blocks(codes, [5], torch.tensor([[1, 0]], dtype=torch.int32), 4)
    assert (blocks == -128).sum() == blocks.numel() - codes.numel()


def test_storage_has_the_elements_of_a_row_together() -> None:
    rows, slots = torch.zeros(2, 2, 64), torch.tensor([3, 4])
    codes, scales = torch.zeros(2, 16, 2, 64, dtype=torch.int8), torch.zeros(2, 16, 2, 4)
    columns_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (codes, scales)]
    for storage in ((columns_first[0], scales), (codes, columns_first[1])):
        with pytest.raises(ValueError, match="do not lie together"):
            store_kv(rows, slots, *storage)
