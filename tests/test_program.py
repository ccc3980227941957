"""Parts of graphs that run as programs of native steps, against torch one operation after the other."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_exact
from helpers.moe_models import build, case_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ktcompile.graph import report
from ktcompile.ops.observer import observing
from ktcompile.ops.store import linear_store
from ktcompile.runtime import program


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear_compile_reports()
    yield
    torch._dynamo.reset()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Parts:
    """Counts the calls of parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        call = program.Part.__call__

        def counted(part: program.Part, *args: Any) -> Any:
            self.calls += 1
            return call(part, *args)

        monkeypatch.setattr(program.Part, "__call__", counted)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    return Parts(monkeypatch)


def check(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> None:
    compiled = torch.compile(function, backend="kt", fullgraph=True, dynamic=dynamic, options={"inner": "program"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), function(*args))


def views(x: Tensor) -> Any:
    a, b = x.split([3, 5], -1)
    c = b.transpose(0, 1)[None, :, 1:].contiguous()
    return (
        a.reshape(-1, 3),
        c,
        b.transpose(1, 2).flatten(1),
        x[..., None, 2:-1],
        x.select(1, -1).unsqueeze(0).squeeze(0),
    )


def elements(x: Tensor, y: Tensor) -> Any:
    z = F.silu(x) * y + F.gelu(x, approximate="tanh") - F.gelu(y)
    return z / y.sum(-1, keepdim=True), (torch.sigmoid(z) * x).to(torch.bfloat16).float(), y[..., :1] * x


def routed(x: Tensor) -> Any:
    weights, ids = torch.topk(torch.softmax(x, -1), 3, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(torch.bfloat16), ids


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 1, 8), (3, 1, 8), (1, 4, 8)])
def test_views(shape: tuple[int, ...], parts: Parts) -> None:
    check(views, random(*shape))
    check(views, random(shape[0], shape[2], shape[1]).transpose(1, 2))
    assert parts.calls == 2


def test_elements_and_rows(parts: Parts) -> None:
    check(elements, random(2, 5, 12), random(2, 5, 12, seed=1))
    check(elements, random(5, 2, 12).transpose(0, 1), random(2, 5, 12, seed=1))
    check(routed, random(40, 16))
    assert parts.calls == 3


def test_ties_and_what_is_no_number() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    compiled = torch.compile(lambda x: torch.topk(x[:, :].reshape(2, 4), 2), backend="kt", options={"inner": "program"})
    values, ids = compiled(x)
    assert values.tolist() == [[3.0, 3.0], [0.0, 0.0]] and ids.tolist() == [[1, 2], [0, 1]]


def cached(x: Tensor, cache: Tensor, at: Tensor) -> Any:
    before = cache.transpose(0, 1).contiguous()
    cache.index_copy_(1, at, x)
    return cache.transpose(0, 1).contiguous(), before, torch.cat([cache, x], 1)


def test_what_is_written_is_read_after_it_and_not_before(parts: Parts) -> None:
    for at in ([0, 1], [4, 2]):
        results = []
        for compiled in (True, False):
            cache, place = random(3, 6, 4), torch.tensor(at)
            run = torch.compile(cached, backend="kt", options={"inner": "program"}) if compiled else cached
            with torch.no_grad():
                results.append((*run(random(3, 2, 4, seed=1), cache, place), cache))
        for got, wanted in zip(*results, strict=True):
            assert torch.equal(got, wanted)
    assert parts.calls


def chosen(x: Tensor, at: Tensor) -> Any:
    y = x * 2
    return y[:, at, :] + 1, y[at], y[..., at].transpose(0, 1)


def test_places_are_chosen_by_number(parts: Parts) -> None:
    for at in ([3, 0, -1, 3], [2]):
        check(chosen, random(4, 5, 6), torch.tensor(at))
    assert parts.calls == 2


def test_a_place_that_is_not_there_is_refused() -> None:
    compiled = torch.compile(chosen, backend="kt", fullgraph=True, options={"inner": "program"})
    with torch.no_grad(), pytest.raises(ValueError, match="index 4 of 4"):
        compiled(random(4, 5, 6), torch.tensor([4]))


def test_an_index_that_is_out_of_range_is_refused() -> None:
    compiled = torch.compile(cached, backend="kt", options={"inner": "program"})
    with torch.no_grad(), pytest.raises(ValueError, match="index 6 of 6"):
        compiled(random(3, 2, 4), random(3, 6, 4), torch.tensor([5, 6]))


def mixed(x: Tensor, y: Tensor) -> Any:
    """Operations that have no steps between those that do, and one that changes what was read before."""
    a = (F.silu(x) + y).reshape(-1, 4)
    b = torch.cumsum(a, 0)
    c = (b * a - a).reshape(x.shape)
    b.mul_(2.0)
    return F.silu(c) * y, (b + a).reshape(-1), x.erf()


def test_parts_and_other_operations_keep_their_order(parts: Parts) -> None:
    check(mixed, random(2, 3, 4), random(2, 3, 4, seed=1))
    assert parts.calls >= 2


def written_through_a_view(x: Tensor, cache: Tensor) -> Any:
    before = (F.silu(cache) + x).reshape(-1)
    torch.transpose(torch.unsqueeze(cache, 0), 0, 1).mul_(2.0)
    return before, (F.silu(cache) + x).reshape(-1)


def test_what_is_written_through_views_is_seen(parts: Parts) -> None:
    results = []
    for run in (
        torch.compile(written_through_a_view, backend="kt", options={"inner": "program"}),
        written_through_a_view,
    ):
        with torch.no_grad():
            results.append(run(random(3, 4), random(3, 4, seed=1)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
    assert parts.calls


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12, bias=False)
        self.norm = nn.RMSNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def test_lengths_need_no_new_compilation_and_threads_may_call_at_once(parts: Parts) -> None:
    module = Layers()
    compiled = torch.compile(module, backend="kt", dynamic=True, options={"inner": "program"})
    given = [random(2, n, 12, seed=n) for n in (3, 5, 9, 17)]
    with torch.no_grad():
        wanted = [module(x) for x in given]
        for x, y in zip(given, wanted, strict=True):
            torch.testing.assert_close(compiled(x), y)
        assert len(report.compile_reports()) == 1
        problems: list[str] = []

        def often(x: Tensor, y: Tensor) -> None:
            with torch.no_grad():
                for _ in range(50):
                    if not torch.allclose(compiled(x), y, rtol=1e-5, atol=1e-6):
                        problems.append("wrong")

        workers = [threading.Thread(target=often, args=pair) for pair in zip(given, wanted, strict=True)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not problems
    assert parts.calls > 200


def test_results_outlive_the_next_call() -> None:
    module = Layers()
    compiled = torch.compile(module, backend="kt", options={"inner": "program"})
    with torch.no_grad():
        x, y = random(2, 3, 12), random(2, 3, 12, seed=1)
        first = compiled(x)
        kept = first.clone()
        compiled(y)
        assert torch.equal(first, kept)


def test_weights_are_freed_with_their_module() -> None:
    module = Layers()
    compiled = torch.compile(module, backend="kt", options={"inner": "program"})
    with torch.no_grad():
        compiled(random(2, 3, 12))
    held = len(linear_store()._entries)
    del module, compiled
    torch._dynamo.reset()
    gc.collect()
    assert len(linear_store()._entries) < held


def test_gradients_go_through_torch() -> None:
    x = random(2, 3, 4).requires_grad_()
    compiled = torch.compile(lambda x: (F.silu(x) * x).reshape(-1).sum(), backend="kt", options={"inner": "program"})
    compiled(x).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_who_observes_experts_sees_them() -> None:
    from test_backend import ids, make_model

    model, seen = make_model(num_hidden_layers=2), []
    compiled = torch.compile(model, backend="kt", options={"inner": "program"})
    with torch.no_grad():
        alone = compiled(ids(6), use_cache=False).logits
        again = compiled(ids(6), use_cache=False).logits
        with observing(lambda experts, chosen: seen.append(tuple(chosen.shape))):
            observed = compiled(ids(6), use_cache=False).logits
    torch.testing.assert_close(observed, alone)
    torch.testing.assert_close(again, alone)
    assert seen == [(6, 3), (6, 3)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chain_of_views(data: st.DataObject) -> None:
    """Against torch, whatever the order of views, copies and sums."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    steps: list[tuple[str, Any]] = []
    shape = list(sizes)
    for _ in range(data.draw(st.integers(3, 7))):
        kind = data.draw(st.sampled_from(["transpose", "reshape", "slice", "unsqueeze", "add", "contiguous", "select"]))
        d = data.draw(st.integers(0, len(shape) - 1))
        if kind == "transpose":
            e = data.draw(st.integers(0, len(shape) - 1))
            steps.append((kind, (d, e)))
            shape[d], shape[e] = shape[e], shape[d]
        elif kind == "reshape":
            shape = [*shape[:d], -1] if d else [-1, 1]
            steps.append((kind, tuple(shape)))
            shape = list(_apply(random(*sizes), steps).shape)
        elif kind == "slice" and shape[d] > 1:
            steps.append((kind, (d, 1)))
            shape[d] -= 1
        elif kind == "unsqueeze" and len(shape) < 5:
            steps.append((kind, d))
            shape.insert(d, 1)
        elif kind == "select" and len(shape) > 2:
            steps.append((kind, d))
            shape.pop(d)
        elif kind in ("add", "contiguous"):
            steps.append((kind, None))
    torch._dynamo.reset()
    x = random(*sizes)
    compiled = torch.compile(lambda x: _apply(x, steps), backend="kt", options={"inner": "program"})
    assert torch.equal(compiled(x), _apply(x, steps))


def _apply(x: Tensor, steps: list[tuple[str, Any]]) -> Tensor:
    for kind, how in steps:
        if kind == "transpose":
            x = x.transpose(*how)
        elif kind == "reshape":
            x = x.reshape(how)
        elif kind == "slice":
            x = x[(slice(None),) * how[0] + (slice(how[1], None),)]
        elif kind == "unsqueeze":
            x = x.unsqueeze(how)
        elif kind == "select":
            x = x.select(how, 0)
        elif kind == "add":
            x = x + x
        else:
            x = x.contiguous()
    return x


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_calls_that_run_operation_by_operation_have_the_same_bits(family: str) -> None:
    """The first one, which checks the kernels, and those in which somebody sees what experts are asked for."""
    model, inputs = build(case_of(family), num_hidden_layers=2)
    run = torch.compile(model, backend="kt", options={"inner": "program"}, dynamic=True)
    with torch.no_grad():
        first = run(**inputs).logits
        with observing(lambda *_: None):
            observed = run(**inputs).logits
        assert_exact(run(**inputs).logits, first, "the first call")
        assert_exact(observed, first, "an observed one")
