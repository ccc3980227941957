"""`kt::cached_attention`: as an operator, and as a step of a program, against storing and attending one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.compare import assert_exact
from torch import Tensor

from ktcompile.ops.kv import KV_FORMATS, PagedKV
from ktcompile.runtime import program

BLOCKS, BLOCK_SIZE, HEADS, KV_HEADS, KEY, VALUE = 12, 4, 4, 2, 32, 16
# Sequences with their tokens of this step, and without any at the end, as the engine pads them.
LENGTHS, STARTS = [9, 1, 6, 0, 0], [0, 3, 4, 6, 6, 6]
TABLE = [[5, 2, 7], [0, 0, 0], [3, 1, 0], [0, 0, 0], [0, 0, 0]]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "capped": {"scale": 0.3, "softcap": 5.0},
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return query, key and value of a step, and what is said of its sequences."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, KEY), (KV_HEADS, KEY), (KV_HEADS, VALUE))
    tensors = (torch.randn(1, 6, *s, generator=generator).to(dtype).transpose(1, 2) for s in shapes)
    positions = [(s, p) for s in range(3) for p in range(LENGTHS[s] - STARTS[s + 1] + STARTS[s], LENGTHS[s])]
    slots = [TABLE[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in positions]
    said = (torch.tensor(slots), torch.tensor(TABLE, dtype=torch.int32), torch.tensor(LENGTHS), torch.tensor(STARTS))
    return tuple(tensors), said


def storage(name: str) -> PagedKV:
    """Return storage with something in each position."""
    kv = PagedKV.empty(KV_FORMATS[name], BLOCKS, BLOCK_SIZE, KV_HEADS, KEY, VALUE)
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randn(BLOCKS * BLOCK_SIZE, KV_HEADS, size, generator=generator) for size in (KEY, VALUE))
    kv.store(*rows, torch.arange(BLOCKS * BLOCK_SIZE))
    return kv


def call(kv: PagedKV, inputs: tuple[Tensor, ...], said: tuple[Tensor, ...], rule: dict[str, Any]) -> Tensor:
    given = {"sinks": None, "window": None, "scale": None, "softcap": None} | rule
    blocks = kv.key, kv.value, kv.key_scales, kv.value_scales
    out: Tensor = torch.ops.kt.cached_attention(*blocks, *inputs, *said, *given.values())
    return out


def moved(x: Tensor) -> Tensor:
    """Return the same, by operations of programs, which are of several steps."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kv_format", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)]
)
def test_it_stores_and_attends(kv_format: str, dtype: torch.dtype, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, said = step(dtype)
    wanted_kv = storage(kv_format)
    wanted_kv.store(*(x[0].transpose(0, 1) for x in inputs[1:]), said[0])
    wanted = wanted_kv.attention(inputs[0][0].transpose(0, 1), *said[1:], **RULES[rule])[None]

    def check(got: Tensor, kv: PagedKV, what: str) -> None:
        assert_exact(got, wanted, what)
        for name in ("key", "value", "key_scales", "value_scales"):
            stored, expected = getattr(kv, name), getattr(wanted_kv, name)
            assert stored is expected is None or torch.equal(stored, expected), f"{what}: {name}"

    kv = storage(kv_format)
    check(call(kv, inputs, said, RULES[rule]), kv, "operator")
    calls: list[program.Part] = []
    run = program.Part.__call__
    monkeypatch.setattr(program.Part, "__call__", lambda part, *args: (calls.append(part), run(part, *args))[1])
    compiled = torch.compile(
        lambda kv, inputs: call(kv, tuple(map(moved, inputs)), said, RULES[rule]), backend="kt", fullgraph=True
    )
    kv = storage(kv_format)
    with torch.no_grad():
        check(compiled(kv, inputs), kv, "program")
    assert calls


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.tensor([48, 0, 1, 2, 3, 4]), "48"),
        (1, torch.tensor(TABLE, dtype=torch.int32) + 8, "1[0-9]"),
        (2, torch.tensor([2, 1, 6, 0, 0]), "sequence 0 has"),
        (2, torch.tensor([13, 1, 6, 0, 0]), "13|sequence 0 has"),
        (3, torch.tensor([0, 3, 4, 5, 5, 5]), "query_starts|queries"),
    ],
)
def test_what_cannot_be_is_refused(place: int, value: Tensor, words: str) -> None:
    inputs, said = step(torch.float32)
    wrong = (*said[:place], value, *said[place + 1 :])
    with pytest.raises(ValueError, match=words):
        call(storage("fp32"), inputs, wrong, {})
    compiled = torch.compile(
        lambda kv, inputs: call(kv, tuple(map(moved, inputs)), wrong, {}), backend="kt", fullgraph=True
    )
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        compiled(storage("fp32"), inputs)
