"""Steps of elements, integers and tables, against torch one operation after the other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ktcompile import _native
from ktcompile._native import Element, Opcode
from ktcompile.machine import machine
from ktcompile.ops.threads import native_threads
from ktcompile.runtime import program
from ktcompile.runtime.program_builder import ELEMENTS

_OPS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "le", "lt", "ge", "gt")
}
_OF_INTEGERS = ["add", "sub", "mul", "le", "lt", "ge", "gt"]
_OF_FLOATS = ["add", "sub", "mul", "truediv"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> None:
    """See that all of a function is one part, twice, which has torch's bits."""
    calls = 0
    call = program.Part.__call__

    def counted(part: program.Part, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return call(part, *args)

    compiled = torch.compile(function, backend="kt", fullgraph=True, dynamic=dynamic, options={"inner": "program"})
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(program.Part, "__call__", counted)
        for _ in range(2):
            given = [a.clone() if isinstance(a, Tensor) else a for a in args]
            wanted = function(*given)
            given = [a.clone() if isinstance(a, Tensor) else a for a in args]
            got = compiled(*given)
            for g, w in zip(got, wanted, strict=True):
                same(g, w)
    assert calls == 2


def same(got: Tensor, wanted: Tensor) -> None:
    if wanted.is_floating_point():
        assert_exact(got, wanted)
    else:
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def _broadcast_shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    full = draw(st.lists(st.sampled_from([1, 2, 3, 5, 17]), min_size=1, max_size=4))
    shapes = []
    for _ in range(2):
        shape = [1 if draw(st.booleans()) else n for n in full]
        shapes.append(shape[draw(st.integers(0, len(shape))) :])
    return shapes[0], shapes[1]


def _build(opcode: Opcode, elements: list[Element], whole: list[Any], real: list[Any]) -> _native.Program:
    made = _native.Program(elements, 0, 0)
    made.finish([made.add(opcode, list(range(len(elements))), 1, whole, real, -1)])
    return made


def _run(made: _native.Program, tensors: list[Tensor], dtype: torch.dtype, isa: str | None = None) -> Tensor:
    results: list[Tensor] = []

    def allocate(element: Element, shape: list[int]) -> int:
        results.append(torch.empty(shape, dtype=dtype))
        return results[-1].data_ptr()

    made.run(native_threads().context(), isa or machine().isa, tuple(tensors), allocate)
    return results[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_operands_of_any_shapes_that_fit(data: st.DataObject) -> None:
    a, b = _broadcast_shapes(data.draw)
    name = data.draw(st.sampled_from(_OF_INTEGERS))
    x, y = ((random(*s, seed=i) * 9).long() for i, s in enumerate((a, b)))
    if data.draw(st.booleans()) and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    made = _build(Opcode.integers, [Element.i64] * 2, [(_OF_INTEGERS.index(name), -1)], [])
    wanted = _OPS[name](x, y)
    same(_run(made, [x, y], wanted.dtype), wanted)

    name = data.draw(st.sampled_from(_OF_FLOATS))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    if x.dim() + y.dim() == 0:
        return
    element = ELEMENTS[dtype]
    numbers_of = [(1 + _OF_FLOATS.index(name), -1), (list(ELEMENTS.values()).index(element), -1)]
    made = _build(Opcode.elementwise, [element] * 2, numbers_of, [])
    p, q = (random(*t.shape, seed=5 + i).to(dtype) for i, t in enumerate((x, y)))
    if p.dim() > 1:
        p = p.transpose(0, -1).contiguous().transpose(0, -1)
    same(_run(made, [p, q], dtype), _OPS[name](p, q))


def test_shapes_that_do_not_fit_are_refused() -> None:
    made = _build(Opcode.integers, [Element.i64] * 2, [(0, -1)], [])
    with pytest.raises(ValueError, match="cannot be expanded"):
        _run(made, [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)], torch.int64)


def _angles() -> Tensor:
    """Random ones, those next to zeros of both functions, and what is far away or no number."""
    near = torch.from_numpy(np.arange(-70000, 70000) * (np.pi / 2)).float()
    odd = [0.0, -0.0, 2.0**20, 2.0**20 + 1, -(2.0**21), 1e9, -1e30, 3.4e38, float("inf"), float("nan")]
    return torch.cat([random(20000) * 3, random(20000, seed=1) * 2e5, near, torch.tensor(odd), torch.tensor(odd[:3])])


@pytest.mark.parametrize("isa", [i for i in ("scalar", "avx2", "avx512") if i in machine().isas])
@pytest.mark.parametrize("name", ["cos", "sin"])
def test_cosines_and_sines_are_rounded_once(name: str, isa: str) -> None:
    x = _angles()
    op = 9 if name == "cos" else 10
    made = _build(Opcode.elementwise, [Element.f32], [(op, -1), (0, -1)], [])
    got = _run(made, [x], torch.float32, isa)
    wanted = getattr(torch, name)(x.double()).float()
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num()) and torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[x == 0].signbit(), wanted[x == 0].signbit())
    # Whoever is beside a number does not matter.
    alone = torch.cat([_run(made, [one], torch.float32, isa) for one in x[-20:].split(1)])
    assert torch.equal(alone.nan_to_num(), got[-20:].nan_to_num())
    torch.testing.assert_close(got, getattr(torch, name)(x), rtol=2e-7, atol=0, equal_nan=True)


def rotary(positions: Tensor, frequencies: Tensor) -> Any:
    angles = positions[..., None].float() * frequencies.to(device=positions.device, dtype=torch.float32)
    return (torch.cat((angles, angles), dim=-1) * 0.7).to(torch.bfloat16), angles


def outer(positions: Tensor, frequencies: Tensor) -> Any:
    wide = frequencies[None, :, None].float().expand(positions.shape[0], -1, 1)
    angles = (wide @ positions[:, None, :].float()).transpose(1, 2)
    return torch.cat((angles, angles), dim=-1), angles


@pytest.mark.parametrize("positions", [(1, 1), (1, 7), (3, 4)])
@pytest.mark.parametrize("function", [rotary, outer])
def test_angles(function: Callable[..., Any], positions: tuple[int, int]) -> None:
    at = torch.randint(131072, positions, generator=torch.Generator().manual_seed(0))
    check(function, at, random(64).exp())


def smaller(x: Tensor, y: Tensor) -> Any:
    return x * 0.1, 3 * x, x / 0.7, x * y, y + x, x - y, y / x


def numbers(x: Tensor) -> Any:
    return x + 0.1, 3 + x, x - 0.3, x * 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(17,), (5, 1), (1, 17), (3, 1, 1)])
def test_numbers_and_smaller_operands(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(smaller, random(3, 5, 17).to(dtype), random(*shape, seed=1).to(dtype))


def test_numbers_are_added() -> None:
    check(numbers, random(3, 5))


def masked(counter: Tensor, size: int) -> Any:
    here = counter.to(torch.device("cpu"))
    at = torch.arange(3, device=counter.device) + counter
    keys, queries = torch.arange(size), torch.arange(1, 4) + here
    mask = (keys[None, :] <= queries[:, None]) & (keys[None, :] > queries[:, None] - 2)
    before = counter + 0
    counter.add_(3)
    return at, mask[None, None].expand(2, -1, 3, size).contiguous(), before, counter + 1, (at * 2 - 1).float()


@pytest.mark.parametrize("size", [9, 40])
def test_masks_and_counters(size: int) -> None:
    check(masked, torch.tensor(4), size, dynamic=True)


def looked_up(ids: Tensor, table: Tensor) -> Any:
    return F.embedding(ids, table, padding_idx=0), F.embedding(ids[0], table) * 2.0, ids + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, 700)])
def test_tables(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ids = torch.randint(30, shape, generator=torch.Generator().manual_seed(0))
    check(looked_up, ids, random(30, 65).to(dtype))
    check(looked_up, ids, random(65, 30).to(dtype).t())


@pytest.mark.parametrize("index", [30, -1])
def test_a_row_that_is_not_in_the_table_is_refused(index: int) -> None:
    compiled = torch.compile(looked_up, backend="kt", fullgraph=True, options={"inner": "program"})
    with torch.no_grad(), pytest.raises(IndexError, match=f"index {index} of a table of 30"):
        compiled(torch.tensor([[3, index]]), random(30, 8))
