"""Keys and values that others computed give the same logits and tokens, bit for bit, and nobody has a wrong one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from helpers.engines import Answer, engine_of, memory_of, prompts, run_all, tiny
from helpers.prefixes import DRAWN, GREEDY, LENGTH, PROMPT, SIZE, Logits, Watched, same
from helpers.text_model import build_model

from ktcompile.engine.runner import StepLogits
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.scheduler.batch import Step


@pytest.fixture(autouse=True)
def fresh(threads: Callable[[int], None]) -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(family: str, dtype: torch.dtype, **options: Any) -> None:
    engine = Watched(engine_of(tiny(family, dtype), **options))
    cold: list[tuple[Answer, Logits]] = []
    for i, params in enumerate((GREEDY, DRAWN)):
        (answer,) = engine.serve((PROMPT, params), salt=f"cold {i}")
        assert engine.cached["0/0"] == 0
        cold.append((answer, engine.logits["0/0"]))
    # Any number of blocks there already: none, some, all but that of the last position.
    for there in (*range(0, len(PROMPT) + 1, SIZE), len(PROMPT), len(PROMPT) + 20):
        engine.serve(((PROMPT + [1] * 20)[: max(1, there)], SamplingParams(1)), salt=f"warm {there}")
        for params, (answer, logits) in zip((GREEDY, DRAWN), cold, strict=True):
            assert engine.serve((PROMPT, params), salt=f"warm {there}") == [answer]
            most = (len(PROMPT) - 1) // SIZE * SIZE
            assert engine.cached["0/0"] == (most if params is DRAWN else min(most, there // SIZE * SIZE))
            assert same(engine.logits["0/0"], logits)
    check_company(engine, cold)
    check_little_memory(Watched(engine_of(tiny(family, dtype), **_narrow(engine), **options)), cold)


def check_company(engine: Watched, cold: Sequence[tuple[Answer, Logits]]) -> None:
    """Requests that share a part of the prompt, or all of it, come at once; then those that go on from answers."""
    (greedy, logits), (drawn, _) = cold
    turn = [*PROMPT, *greedy.token_ids, 3, 1]
    (expected,) = engine.serve((turn, GREEDY), salt="cold turn")
    of_turn = engine.logits["0/0"]
    given = [(PROMPT[:25], GREEDY), (PROMPT, GREEDY), (PROMPT, DRAWN), (PROMPT[:20] + [5] * 9, DRAWN)]
    answers = engine.serve(*given, salt="company")
    assert answers[1:3] == [greedy, drawn] and same(engine.logits["1/0"], logits)
    assert [engine.cached[f"{i}/0"] for i in range(4)] == [0, 24, 48, 16]
    assert engine.serve((turn, GREEDY), salt="company") == [expected]
    assert engine.cached["0/0"] == (len(PROMPT) + LENGTH - 1) // SIZE * SIZE and same(engine.logits["0/0"], of_turn)
    # Several answers to one prompt: it is computed once.
    several = SamplingParams(LENGTH, 1.2, 0.9, seed=7, ignore_eos=True, n=3)
    assert engine.serve((PROMPT, several), salt="several")[0] == drawn
    assert [engine.cached[f"0/{i}"] for i in range(3)] == [0, 48, 48]


def check_little_memory(engine: Watched, cold: Sequence[tuple[Answer, Logits]]) -> None:
    """Requests are preempted, and go on from blocks that are left."""
    company = [(prompt, SamplingParams(20 + i, 0.7, seed=i)) for i, prompt in enumerate(prompts(6))]
    for answer, logits in cold:
        params = GREEDY if answer is cold[0][0] else DRAWN
        answers = engine.serve(*company[:2], (PROMPT, params), *company[2:], (PROMPT, params), salt="little")
        assert answers[2] == answers[-1] == answer
        assert same(engine.logits["2/0"], logits) and same(engine.logits["7/0"], logits)
    assert engine.engine.stats().num_preemptions > 0


def _narrow(engine: Watched) -> dict[str, Any]:
    memory = memory_of(engine.engine, 144)
    return {"max_num_batched_tokens": 47, "chunk_size": 8, "kv_device_memory": memory}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_warm_is_cold(family: str) -> None:
    check(family, torch.bfloat16)


@pytest.mark.slow
def test_warm_is_cold_in_int8() -> None:
    check("qwen3_moe", torch.float32, kv_format="int8")


@pytest.fixture
def engine() -> Watched:
    return Watched(engine_of(build_model(), eager=True))


def test_tenants_share_nothing(engine: Watched) -> None:
    prompt = list(range(30))
    engine.serve((prompt, GREEDY), salt="a")
    for salt in ("b", "", "A", "a "):
        engine.serve((prompt, GREEDY), salt=salt)
        assert engine.cached["0/0"] == 0
    engine.serve((prompt, GREEDY), salt="a")
    assert engine.cached["0/0"] == 24


def test_a_salt_that_is_too_long_is_refused(engine: Watched) -> None:
    """Museum 22."""
    with pytest.raises(ValueError, match="cache_salt has 257 bytes; it may have 256"):
        engine.engine.add("0", [1], GREEDY, cache_salt="s" * 257)
    assert not engine.engine.has_requests


def test_it_can_be_turned_off() -> None:
    engine = Watched(engine_of(build_model(), eager=True, enable_prefix_caching=False))
    for _ in range(2):
        engine.serve((list(range(30)), GREEDY), salt="")
        assert engine.cached["0/0"] == 0
    stats = engine.engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (0, 0)


def test_records_and_stats_say_what_was_not_computed(engine: Watched) -> None:
    prompt = list(range(30))
    engine.serve((prompt, GREEDY), salt="")
    engine.engine.add("x", prompt, SamplingParams(3, 0.0, n=2))
    deltas = [delta for _ in range(3) for delta in engine.engine.step()]
    assert [delta.num_cached_tokens for delta in deltas] == [24] * 6
    stats = engine.engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits, stats.prompt_tokens) == (90, 48, 90)


def test_log_probabilities_of_a_prompt_are_computed(engine: Watched) -> None:
    prompt = list(range(30))
    engine.serve((prompt, GREEDY), salt="")
    engine.engine.add("x", prompt, SamplingParams(2, 0.0, prompt_logprobs=0, n=2))
    (first, second) = engine.engine.step()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 24)
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == 30
    run_all(engine.engine)


def test_what_a_failing_step_wrote_is_found_by_nobody(engine: Watched) -> None:
    """Of a step that fails, and of one whose logits are not finite; what others wrote stays."""
    prompt, run = list(range(30)), engine.engine._runner.run

    def failing(step: Step) -> StepLogits:
        run(step)
        raise RuntimeError("no memory")

    def broken(step: Step) -> StepLogits:
        found = run(step)
        found.values[:] = torch.nan
        return found

    engine.serve((prompt[:16], GREEDY), salt="")
    for wrong in (failing, broken):
        engine.engine._runner.run = wrong  # type: ignore[method-assign]
        (answer,) = engine.serve((prompt, GREEDY), salt=wrong.__name__)
        assert answer.finish_reason == "error"
        engine.engine._runner.run = run  # type: ignore[method-assign]
        engine.serve((prompt, GREEDY), salt=wrong.__name__)
        assert engine.cached["0/0"] == 0
    engine.serve((prompt, GREEDY), salt="")
    assert engine.cached["0/0"] == 16


def test_a_namespace_is_of_the_model_and_how_it_computes() -> None:
    first, second = (engine_of(build_model(), eager=True, max_num_seqs=n).namespace for n in (30, 40))
    assert first.weights != second.weights, "what two engines keep is not shared"
    assert replace(first, weights="") == replace(second, weights="")
    other = engine_of(build_model(), eager=True, kv_format="int8", block_size=4).namespace
    assert {f.name for f in fields(other) if getattr(other, f.name) != getattr(first, f.name)} == {
        "weights", "kv_format", "layout", "block_size",
    }  # fmt: skip
    longer = engine_of(build_model(positions=256), eager=True).namespace
    assert longer.attention != first.attention
