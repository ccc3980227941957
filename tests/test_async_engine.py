"""Requests of an event loop that an engine in another thread answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from helpers.fake_engine import FakeEngine, fake_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.engine.async_engine import AsyncEngine, Health, SlowReaderError, StepError, UnavailableError
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.scheduler.request import QueueFullError


def serve(engine: FakeEngine, use: Callable[[AsyncEngine], Awaitable[Any]], **options: Any) -> Any:
    """Run `use` with an engine that was started, and end its thread."""

    async def run() -> Any:
        served = AsyncEngine(engine, **options)
        served.start()
        try:
            return await asyncio.wait_for(use(served), 60)
        finally:
            await served.close()
            assert not served._thread.is_alive()

    return asyncio.run(run())


async def read(served: AsyncEngine, name: str, prompt: list[int], count: int = 5, **more: Any) -> list[int]:
    tokens: list[int] = []
    async with aclosing(served.generate(name, prompt, SamplingParams(max_tokens=count), **more)) as stream:
        async for deltas in stream:
            tokens += [token for delta in deltas for token in delta.token_ids]
    return tokens


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until something is so; `serve` ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.002)


def test_many_requests_get_each_its_own_tokens() -> None:
    async def use(served: AsyncEngine) -> None:
        names = [f"r{i}" for i in range(40)]
        answers = await asyncio.gather(*(read(served, name, [i], 3 + i % 7) for i, name in enumerate(names)))
        assert answers == [fake_tokens([i], 3 + i % 7) for i in range(40)]
        assert served.num_streams == 0

    serve(FakeEngine(width=7), use)


def test_each_answer_of_a_request_comes_to_its_end() -> None:
    async def use(served: AsyncEngine) -> None:
        ends = []
        async for deltas in served.generate("a", [1], SamplingParams(max_tokens=4, n=3)):
            ends += [delta.index for delta in deltas if delta.finish_reason]
        assert sorted(ends) == [0, 1, 2]

    serve(FakeEngine(), use)


def test_what_the_engine_does_not_take_is_said_before_the_first_delta() -> None:
    async def use(served: AsyncEngine) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            await read(served, "a", [])
        first = asyncio.create_task(read(served, "b", [1], 10_000))
        await settled(lambda: served.engine.has_requests)
        with pytest.raises(QueueFullError) as caught:
            await read(served, "c", [2])
        assert caught.value.retry_after == 3
        with pytest.raises(ValueError, match="already"):
            await read(served, "b", [3])
        first.cancel()
        await settled(lambda: not served.engine.has_requests)

    serve(FakeEngine(width=1, queue=0, before_step=lambda: time.sleep(0.001)), use)


def test_a_reader_that_leaves_or_is_cancelled_aborts_within_a_step() -> None:
    engine = FakeEngine(before_step=lambda: time.sleep(0.002))

    async def use(served: AsyncEngine) -> None:
        async with aclosing(served.generate("left", [1], SamplingParams(max_tokens=100_000))) as stream:
            async for _ in stream:
                break
        steps = engine.steps
        await settled(lambda: "left" in engine.aborted)
        assert engine.steps <= steps + 2
        task = asyncio.create_task(read(served, "cancelled", [1], 100_000))
        await settled(lambda: "cancelled" in engine.requests)
        task.cancel()
        await settled(lambda: "cancelled" in engine.aborted)
        assert served.num_streams == 0

    serve(engine, use)


def test_a_request_that_is_cancelled_before_it_was_added_leaves_nothing() -> None:
    gate = threading.Event()
    engine = FakeEngine(before_step=lambda: gate.wait(10) and None)

    async def use(served: AsyncEngine) -> None:
        first = asyncio.create_task(read(served, "a", [1]))
        await settled(lambda: engine.steps == 1)  # the thread is in a step
        second = asyncio.create_task(read(served, "b", [2]))
        await asyncio.sleep(0.01)
        second.cancel()
        gate.set()
        assert await first == fake_tokens([1], 5)
        await settled(lambda: not engine.has_requests)

    serve(engine, use)


def test_a_slow_reader_is_aborted_and_holds_nobody() -> None:
    engine = FakeEngine(before_step=lambda: time.sleep(0.0005))

    async def use(served: AsyncEngine) -> None:
        slow = served.generate("slow", [1], SamplingParams(max_tokens=1_000_000))
        await anext(slow)
        assert await read(served, "quick", [2], 50) == fake_tokens([2], 50)
        await settled(lambda: "slow" in engine.aborted)
        assert engine.steps < 5000
        with pytest.raises(SlowReaderError):
            async for _ in slow:
                pass
        assert await read(served, "next", [3]) == fake_tokens([3], 5)

    serve(engine, use, max_unread=64)


def test_a_step_that_fails_ends_its_requests_alone() -> None:
    fail = [False]

    def before_step() -> None:
        if fail[0]:
            fail[0] = False
            raise RuntimeError("broken")

    engine = FakeEngine(before_step=before_step)

    async def use(served: AsyncEngine) -> None:
        fail[0] = True
        with pytest.raises(StepError, match="RuntimeError"):
            await read(served, "a", [1])
        assert served.health is Health.READY
        assert await read(served, "b", [2]) == fake_tokens([2], 5)

    serve(engine, use)


def test_an_engine_whose_steps_keep_failing_is_dead() -> None:
    def before_step() -> None:
        raise RuntimeError("broken")

    async def use(served: AsyncEngine) -> None:
        for i in range(3):
            assert served.health is Health.READY
            with pytest.raises(StepError):
                await read(served, f"r{i}", [1])
        assert served.health is Health.DEAD
        with pytest.raises(UnavailableError, match="dead"):
            await read(served, "last", [1])
        assert await served.drain(1)

    serve(FakeEngine(before_step=before_step), use)


def test_what_ends_the_thread_is_said_to_all() -> None:
    def before_step() -> None:
        raise SystemExit

    async def use(served: AsyncEngine) -> None:
        with pytest.raises(StepError):
            await read(served, "a", [1])
        assert served.health is Health.DEAD

    serve(FakeEngine(before_step=before_step), use)


def test_drain_ends_what_runs_and_takes_nothing() -> None:
    async def use(served: AsyncEngine) -> None:
        first = asyncio.create_task(read(served, "a", [1], 40))
        await settled(lambda: served.engine.has_requests)
        drained = asyncio.create_task(served.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="draining"):
            await read(served, "b", [2])
        assert await drained
        assert await first == fake_tokens([1], 40)

    serve(FakeEngine(before_step=lambda: time.sleep(0.001)), use)


def test_drain_aborts_what_takes_too_long() -> None:
    engine = FakeEngine(before_step=lambda: time.sleep(0.001))

    async def use(served: AsyncEngine) -> None:
        first = asyncio.create_task(read(served, "a", [1], 1_000_000))
        await settled(lambda: engine.has_requests)
        assert not await served.drain(0.05)
        with pytest.raises(UnavailableError):
            await first
        await settled(lambda: engine.aborted == ["a"])

    serve(engine, use)


def test_an_idle_engine_uses_no_cpu() -> None:
    async def use(served: AsyncEngine) -> None:
        await read(served, "a", [1])
        engine, before = served.engine, time.process_time()
        steps = engine.steps
        time.sleep(0.5)  # the loop rests too
        assert engine.steps == steps
        assert time.process_time() - before < 0.02

    serve(FakeEngine(), use)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_readers_do_nothing_is_left(data: st.DataObject) -> None:
    """Readers that read all, leave, sleep or are cancelled, and steps that fail."""
    kinds = st.sampled_from(("all", "leave", "cancel", "slow"))
    plans = data.draw(st.lists(st.tuples(kinds, st.integers(1, 30), st.integers(1, 3)), min_size=1, max_size=12))
    failing = data.draw(st.sets(st.integers(1, 40), max_size=2))
    engine = FakeEngine(width=data.draw(st.integers(1, 4)))

    def before_step() -> None:
        if engine.steps in failing:
            raise RuntimeError("broken")

    engine.before_step = before_step

    async def one(served: AsyncEngine, i: int, kind: str, count: int, n: int) -> None:
        got: dict[int, list[int]] = {}
        params = SamplingParams(max_tokens=count, n=n)
        try:
            async with aclosing(served.generate(f"r{i}", [i], params)) as stream:
                async for deltas in stream:
                    for delta in deltas:
                        got.setdefault(delta.index, []).extend(delta.token_ids)
                    if kind == "leave":
                        return
                    if kind == "slow":
                        await asyncio.sleep(0.001)
        except (StepError, SlowReaderError):
            assert failing or count > 4  # more than may be unread
        else:
            assert got == {index: fake_tokens([i], count) for index in range(n)}

    async def use(served: AsyncEngine) -> None:
        tasks = [asyncio.create_task(one(served, i, *plan)) for i, plan in enumerate(plans)]
        await asyncio.sleep(0.001)
        for task, (kind, _, _) in zip(tasks, plans, strict=True):
            if kind == "cancel":
                task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError)
        assert served.num_streams == 0
        await settled(lambda: not engine.has_requests and not served._unfinished)
        assert await served.drain(1)

    serve(engine, use, max_unread=4)
