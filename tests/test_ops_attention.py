"""`kt::attention` and `kt::paged_attention` against plain torch, and their bits against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.attention import DTYPES, Inputs, Shape, in_blocks, poisoned, random_inputs
from helpers.compare import assert_exact, assert_reduction
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile import _native
from ktcompile.machine import machine
from ktcompile.ops import attention, paged_attention
from ktcompile.ops import attention_reference as reference

ISAS = machine().isas
# The best of each of two orders of sums, where queries, keys and values are bf16: of AMX, and of all others.
ORDERS = tuple(next(isa for isa in ISAS if _native.sums_on_tiles(isa) == tiles) for tiles in (False, True))
ORDERS_OF_DTYPES = [*((dtype, ORDERS[0]) for dtype in DTYPES), (torch.bfloat16, ORDERS[1])]
CAUSAL = {"causal": True}
# Positions around the edges of tiles and splits.
LENGTHS = (1, 17, 63, 64, 65, 255, 257, 1000)
SIZES = ((8, 8), (16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (576, 512), (9, 3))
RULES: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": CAUSAL,
    "window": {"causal": True, "window": 37},
    "softcap": {"causal": True, "softcap": 5.0, "scale": 0.7},
    "first": {"causal": True, "first_position": 3},
    "sinks": {"causal": True, "window": 70, "sinks": torch.tensor([0.3, -2.0, 4.0, 80.0])},
    "lengths": {"causal": True, "lengths": torch.tensor([40, 70])},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", LENGTHS)
def test_positions(positions: int, dtype: torch.dtype) -> None:
    for queries in (1, min(positions, 19)):
        inputs = random_inputs(Shape(queries=queries, positions=positions), dtype)
        assert_reduction(attention(*inputs, **CAUSAL), reference.attention(*inputs, **CAUSAL), f"{queries} queries")


@pytest.mark.parametrize("isa", ORDERS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_head_sizes(sizes: tuple[int, int], isa: str) -> None:
    for dtype in DTYPES:
        inputs = random_inputs(Shape(1, 4, 2, 7, 130, *sizes), dtype)
        got, wanted = attention(*inputs, **CAUSAL, isa=isa), reference.attention(*inputs, **CAUSAL)
        assert got.shape == (1, 4, 7, sizes[1]) and got.dtype == dtype
        assert_reduction(got, wanted, str(dtype))


@pytest.mark.parametrize("isa", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, isa: str) -> None:
    for dtype in DTYPES:
        inputs = random_inputs(Shape(), dtype)
        got, wanted = attention(*inputs, **RULES[rule], isa=isa), reference.attention(*inputs, **RULES[rule])
        assert_reduction(got, wanted, str(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rule", RULES)
def test_every_instruction_set_gives_the_same_bits(rule: str, isa: str) -> None:
    for sizes in ((16, 16), (80, 36), (9, 3)):
        for dtype in DTYPES:
            inputs = random_inputs(Shape(2, 4, 2, 5, 70, *sizes), dtype)
            same = ORDERS[dtype == torch.bfloat16 and _native.sums_on_tiles(isa)]
            assert_exact(attention(*inputs, **RULES[rule], isa=isa), attention(*inputs, **RULES[rule], isa=same), isa)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (140, 1)], ids=str)
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    inputs = random_inputs(Shape(2, *heads, 3, 66))
    assert_reduction(attention(*inputs, **CAUSAL), reference.attention(*inputs, **CAUSAL))


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 5, 70), (2, 1, 5, 70), (1, 1, 1, 70), (5, 70), (2, 1, 5, 1)], ids=str)
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(shape, generator=generator)
    mask = numbers > -0.5 if dtype == torch.bool else numbers.masked_fill(numbers > 1, -torch.inf).to(dtype)
    for of_inputs, isa in zip((torch.float32, torch.bfloat16), ORDERS, strict=True):
        inputs = random_inputs(Shape(), of_inputs)
        got, wanted = (
            attention(*inputs, mask=mask, **CAUSAL, isa=isa),
            reference.attention(*inputs, mask=mask, **CAUSAL),
        )
        assert_reduction(got, wanted, isa)


def test_a_mask_of_the_lowest_number_gives_the_mean_of_values() -> None:
    inputs = random_inputs(Shape(positions=50))
    got = attention(*inputs, mask=torch.full((50,), torch.finfo(torch.float32).min))
    mean = inputs.value.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 5, 16)
    assert_reduction(got, mean)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    inputs = random_inputs(Shape(positions=300))
    mask = torch.ones(5, 300, dtype=torch.bool)
    mask[2] = False
    got = attention(*inputs, mask=mask)
    assert not got[:, :, 2].any() and got[:, :, [0, 1, 3, 4]].abs().min() > 0
    assert not attention(*inputs, lengths=torch.tensor([0, 0])).any()
    assert attention(*random_inputs(Shape(positions=0))).shape == (2, 4, 5, 16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masked_keys_and_values_may_hold_anything(kind: str, bad: float, isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = random_inputs(Shape(positions=135), dtype)
        seen = torch.rand(135, generator=torch.Generator().manual_seed(1)) < 0.8
        mask = seen if kind == "boolean" else torch.zeros(135).masked_fill(~seen, -torch.inf)
        wanted = attention(*inputs, mask=mask, isa=isa)
        inputs.key[:, :, ~seen] = bad
        inputs.value[:, :, ~seen] = bad
        assert_exact(attention(*inputs, mask=mask, isa=isa), wanted, str(dtype))


@pytest.mark.parametrize("isa", ORDERS)
def test_later_positions_may_hold_anything(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = random_inputs(Shape(queries=135, positions=135), dtype)
        wanted = attention(*inputs, causal=True, window=50, isa=isa)
        inputs.key[:, :, 100:] = torch.nan
        inputs.value[:, :, 100:] = torch.inf
        got = attention(*inputs, causal=True, window=50, isa=isa)
        assert_exact(got[:, :, :100], wanted[:, :, :100], str(dtype))


@pytest.mark.parametrize("isa", ORDERS)
def test_numbers_that_are_not_finite_spread_to_those_who_see_them(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = random_inputs(Shape(queries=9, positions=9), dtype)
        inputs.value[0, 0, 4, 3] = torch.inf
        inputs.key[1, 1, 6] = torch.nan
        got = attention(*inputs, **CAUSAL, isa=isa)
        assert got[0, :2, 4:, 3].isinf().all() and got[1, 2:, 6:].isnan().all()
        assert got[0, :, :4].isfinite().all() and got[0, 2:].isfinite().all() and got[1, 2:, :6].isfinite().all()


@pytest.mark.parametrize("size", [1, 16, 100])
@pytest.mark.parametrize(("dtype", "isa"), ORDERS_OF_DTYPES, ids=str)
def test_chunks_of_a_prompt_give_the_same_bits(dtype: torch.dtype, isa: str, size: int) -> None:
    length = 330
    query, key, value = random_inputs(Shape(1, 4, 2, length, length, 32, 32), dtype)
    for rule in (CAUSAL, {"causal": True, "window": 90}, {"causal": True, "sinks": torch.randn(4)}):
        whole = attention(query, key, value, **rule, isa=isa)
        for begin in range(0, length, size):
            end = min(begin + size, length)
            part = attention(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], **rule, isa=isa)
            assert_exact(part, whole[:, :, begin:end], f"queries from {begin} on")


@pytest.mark.parametrize("isa", ISAS)
def test_weights_are_the_same_beside_any_maximum(isa: str) -> None:
    """A cache that drops positions behind a window: tiles begin elsewhere, and other keys come before a maximum."""
    length, window = 200, 90
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = random_inputs(Shape(1, 4, 2, length, length, 8, 16), dtype)
        # Weights of 2^-8 to 1 in bf16 times integers of two bits: their sums are exact in any order.
        query, key, value = query.sign(), key.clamp(-1, 1), value.round().clamp(-2, 2)
        rule = {"causal": True, "window": window, "scale": 2.7 / 8, "isa": isa}
        whole = attention(query, key, value, **rule)
        for begin in range(0, length, 16):
            first, end = max(0, begin + 1 - window), min(begin + 16, length)
            part = attention(query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end], **rule)
            if dtype == torch.bfloat16:
                assert_exact(part, whole[:, :, begin:end], f"queries from {begin} on")
            else:
                assert_reduction(part, whole[:, :, begin:end].double(), f"queries from {begin} on")


@pytest.mark.parametrize("isa", ISAS)
def test_scores_of_any_size(isa: str) -> None:
    """The greatest has all weight: 2^100 is further from the others than any number that a weight may have."""
    for dtype in (torch.float32, torch.bfloat16):
        _, _, value = random_inputs(Shape(1, 1, 1, 1, 100, 16, 16), dtype)
        query, key = (torch.ones(1, 1, count, 16, dtype=dtype) for count in (1, 100))
        for sign in (1, -1):
            for exponent in (10, 24, 60, 100):
                key[:] = sign * 2.0**exponent
                key[:, :, 37] *= 1 + sign / 2
                got = attention(query, key, value, scale=1.0, isa=isa)
                assert_reduction(got[0, 0, 0], value[0, 0, 37].double(), f"{sign} * 2^{exponent} in {dtype}")


@pytest.mark.parametrize("isa", ORDERS)
def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch(isa: str) -> None:
    inputs = random_inputs(Shape(5, 4, 2, 3, 600), torch.bfloat16 if isa == ORDERS[1] else torch.float32)
    lengths = torch.tensor([600, 3, 64, 511, 257])
    rule = {**CAUSAL, "isa": isa}
    together = attention(*inputs, lengths=lengths, **rule)
    for b, length in enumerate(lengths.tolist()):
        alone = attention(*(x[b : b + 1, :, :length] for x in inputs), **rule)
        assert_exact(alone, together[b : b + 1], f"sequence {b}")
        head = attention(inputs.query[b : b + 1, 3:], *(x[b : b + 1, 1:, :length] for x in inputs[1:]), **rule)
        assert_exact(head, together[b : b + 1, 3:], f"a head of sequence {b}")


@pytest.mark.parametrize("isa", ORDERS)
def test_threads_give_the_same_bits(threads: Any, isa: str) -> None:
    for shape in (Shape(1, 4, 1, 1, 3000), Shape(2, 4, 2, 90, 700), Shape(1, 2, 2, 1, 10)):
        inputs = random_inputs(shape, torch.bfloat16)
        threads(1)
        wanted = attention(*inputs, **CAUSAL, isa=isa)
        for count in (2, 3, 5, 8):
            threads(count)
            assert_exact(attention(*inputs, **CAUSAL, isa=isa), wanted, f"{count} threads")


def test_a_boolean_mask_gives_the_bits_of_the_rule_that_it_spells_out() -> None:
    inputs = random_inputs(Shape(queries=200, positions=200))
    for window in (None, 40):
        mask = reference.visible(200, 200, 1, causal=True, window=window)
        assert_exact(attention(*inputs, mask=mask), attention(*inputs, causal=True, window=window))


def test_padding_on_the_left_changes_no_more_than_sums_in_another_order() -> None:
    query, key, value = random_inputs(Shape(1, 4, 2, 20, 80))
    mask = torch.ones(1, 1, 1, 80, dtype=torch.bool)
    mask[..., :10] = False
    wanted = reference.attention(query, key[:, :, 10:], value[:, :, 10:], causal=True)
    assert_reduction(attention(query, key, value, mask=mask, **CAUSAL), wanted)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_blocks_give_the_bits_of_rows_in_order(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([1, 3, 16, 64, 256]))
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    queries = [data.draw(st.integers(0, min(length, 70))) for length in lengths]
    window = data.draw(st.sampled_from([None, 1, 100]))
    dtype, isa = data.draw(st.sampled_from(ORDERS_OF_DTYPES))
    width = -(-max(lengths) // block_size)
    table = torch.randperm(len(lengths) * width).reshape(len(lengths), width).to(torch.int32)
    sinks = torch.randn(4)
    query, key, value = random_inputs(Shape(len(lengths), 4, 2, max(lengths), max(lengths), 12, 20), dtype)
    parts = [query[b, :, length - q : length] for b, (length, q) in enumerate(zip(lengths, queries, strict=True))]
    got = paged_attention(
        torch.cat(parts, 1).transpose(0, 1),
        in_blocks(key, lengths, table, block_size),
        in_blocks(value, lengths, table, block_size),
        table,
        torch.tensor(lengths),
        torch.tensor([0, *queries]).cumsum(0),
        sinks=sinks,
        window=window,
        isa=isa,
    )
    for b, (length, q) in enumerate(zip(lengths, queries, strict=True)):
        rows = [x[b : b + 1, :, :length] for x in (key, value)]
        wanted = attention(parts[b][None], *rows, causal=True, sinks=sinks, window=window, isa=isa)
        assert_exact(got[sum(queries[:b]) :][:q].transpose(0, 1)[None], wanted, f"sequence {b}")


def test_values_may_be_a_part_of_keys() -> None:
    latents = torch.randn(6, 16, 1, 36)
    table, lengths, starts = torch.tensor([[3, 0], [5, 2]], dtype=torch.int32), torch.tensor([20, 9]), [0, 2, 3]
    query = torch.randn(3, 8, 36)
    args = (query, latents, latents[..., :32], table, lengths, torch.tensor(starts))
    assert_reduction(paged_attention(*args), reference.paged_attention(*args))


def test_any_strides() -> None:
    inputs = random_inputs(Shape())
    wanted = attention(*inputs)
    reversed_columns = Inputs(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs))
    tokens_first = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
    one_of_all = Inputs(inputs.query, *(x[:1].expand(2, -1, -1, -1) for x in inputs[1:]))
    assert_exact(attention(*reversed_columns), wanted)
    assert_exact(attention(*tokens_first), wanted)
    assert_exact(attention(*one_of_all)[0], wanted[0])


def test_queries_and_keys_of_other_types() -> None:
    query, key, value = random_inputs(Shape())
    key, value = key.bfloat16(), value.bfloat16()
    assert_exact(attention(query, key, value), attention(query, key.float(), value.float()))


def test_opcheck() -> None:
    inputs = random_inputs(Shape())
    rest = (None, torch.randn(4), None, True, None, None, None, None, None)
    torch.library.opcheck(torch.ops.kt.attention.default, (*inputs, *rest))


def test_a_gradient_is_refused() -> None:
    query, key, value = random_inputs(Shape())
    with pytest.raises(NotImplementedError, match="no backward"):
        attention(query.clone().requires_grad_(), key, value).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 2, 70, 12)}, "size 16 and key of 12"),
        ({"key": torch.zeros(2, 3, 70, 16), "value": torch.zeros(2, 3, 70, 16)}, "multiple of the 3"),
        ({"value": torch.zeros(2, 2, 69, 16)}, "all but the last must be equal"),
        ({"value": torch.zeros(2, 2, 70, 16).half()}, "torch.float16"),
        ({"query": torch.zeros(2, 4, 5, 16).double()}, "query has dtype torch.float64"),
        ({"query": torch.zeros(4, 5, 16)}, "query is \\[4, 5, 16\\]"),
        ({"window": 3}, "without causal"),
        ({"window": 0, "causal": True}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"first_position": -2, "causal": True}, "first_position is -2"),
        ({"mask": torch.zeros(5, 69)}, "must broadcast"),
        ({"mask": torch.zeros(5, 70, dtype=torch.int32)}, "mask has dtype torch.int32"),
        ({"sinks": torch.zeros(2)}, "sinks is \\[2\\]"),
        ({"lengths": torch.tensor([70, 71])}, "lengths has 71"),
        ({"lengths": torch.tensor([70])}, "lengths is \\[1\\]"),
        ({"isa": "mmx"}, "mmx"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {**random_inputs(Shape())._asdict(), **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": torch.tensor([[1, 9]], dtype=torch.int32)}, r"block_table\[0, 1\] is 9"),
        ({"block_table": torch.tensor([[1, 2]])}, "torch.int64"),
        ({"lengths": torch.tensor([33])}, "lengths has 33"),
        ({"query_starts": torch.tensor([0, 2])}, "the last 3"),
        ({"lengths": torch.tensor([2])}, "sequence 0 has 3 queries"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_blocks_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "query": torch.zeros(3, 4, 8),
        "key_blocks": torch.zeros(4, 16, 2, 8),
        "value_blocks": torch.zeros(4, 16, 2, 8),
        "block_table": torch.tensor([[1, 3]], dtype=torch.int32),
        "lengths": torch.tensor([20]),
        "query_starts": torch.tensor([0, 3]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)


def test_poisoned_memory_is_there() -> None:
    """The tests above read none of it, or they would fail."""
    x = poisoned(torch.zeros(2, 3))
    assert x.stride() == (8, 1) and x._base is not None and x._base.isnan().sum() == x._base.numel() - 6
