"""The engine: what it gives, refuses and survives. Where numbers do not matter the model is not compiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.engines import SMALL, Answer, check_empty, engine_of, prompts, run_all, serve, tiny
from helpers.text_model import build_model, byte_level_tokenizer

from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.probe import UnsupportedModelError
from ktcompile.engine.runner import ModelRunner, StepLogits
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.graph.report import clear_compile_reports, compile_reports
from ktcompile.scheduler.batch import Step
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError

GREEDY = SamplingParams(8, 0.0)
EAGER = {"eager": True}


@pytest.fixture(autouse=True)
def fresh(threads: Callable[[int], None]) -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    clear_compile_reports()
    yield
    torch._dynamo.reset()


@pytest.fixture
def engine() -> Engine:
    return engine_of(build_model(), **EAGER)


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Have the model's call of this number fail behind its first layer."""
    run, calls = ModelRunner.run, []

    def failing(runner: ModelRunner, step: Step) -> StepLogits:
        calls.append(step)
        if len(calls) != number:
            return run(runner, step)

        def hook(*_: Any) -> None:
            raise error

        handle = runner.model.model.layers[1].register_forward_hook(hook)
        try:
            return run(runner, step)
        finally:
            handle.remove()

    monkeypatch.setattr(ModelRunner, "run", failing)


def test_shapes_of_steps_compile_nothing_anew() -> None:
    engine = engine_of(build_model(positions=256))
    assert len(compile_reports()) == 1
    assert all(report.inner == "program" for report in compile_reports())
    for count in (1, 2, 3, 8, 31):
        serve(engine, [(prompt, GREEDY) for prompt in prompts(count, 300, 150)])
    serve(engine, [([5] * 200, SamplingParams(2, prompt_logprobs=0))])
    assert len(compile_reports()) == 1


def test_two_engines_of_one_architecture_have_their_own_graphs() -> None:
    first, second = engine_of(build_model()), engine_of(build_model())
    given = [([1, 2, 3], GREEDY)]
    assert serve(first, given) == serve(second, given)
    assert len(compile_reports()) == 2


def test_answers_come_step_by_step(engine: Engine) -> None:
    engine.add("a", [1, 2, 3], SamplingParams(5, 0.0, logprobs=1, prompt_logprobs=0, n=2))
    deltas = []
    while engine.has_requests:
        deltas.append(engine.step())
    assert [len(step) for step in deltas] == [2] * 5
    first = [step[0] for step in deltas]
    assert all(delta.logprobs and next(iter(delta.logprobs[0])) == delta.token_ids[0] for delta in first)
    assert [delta.finish_reason for delta in first] == [None] * 4 + ["length"]
    assert first[0].prompt_logprobs is not None and first[0].prompt_logprobs[0] is None
    assert [next(iter(p)) for p in first[0].prompt_logprobs[1:] if p] == [2, 3]
    assert all(delta.prompt_logprobs is None for delta in (*first[1:], *(step[1] for step in deltas)))
    assert engine.step() == []
    check_empty(engine)


def test_log_probabilities_of_a_long_prompt_come_whole_through_chunks_and_preemption(engine: Engine) -> None:
    prompt = prompts(1, 300, 50)[0] + list(range(45))
    asked = SamplingParams(4, 0.0, prompt_logprobs=2)
    found = []
    for options in ({}, {"chunk_size": 4, "max_num_batched_tokens": 43, "block_size": 4}):
        narrow = engine_of(build_model(positions=128), **EAGER, **options)
        narrow.add("x", prompt, asked)
        found.append(next(d.prompt_logprobs for _ in range(40) for d in narrow.step() if d.prompt_logprobs))
    assert len(found[0]) == len(prompt)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert list(one) == list(other)
        assert [p.logprob for p in one.values()] == pytest.approx([p.logprob for p in other.values()], abs=1e-4)


def test_stats_say_how_it_is(engine: Engine) -> None:
    for i in range(3):
        engine.add(str(i), [i] * 9, GREEDY)
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 3)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.prompt_tokens, stats.generated_tokens) == (3, 0, 27, 3)
    assert stats.num_blocks - stats.num_free_blocks == 6 and stats.kv_usage == 6 / stats.num_blocks
    run_all(engine)
    assert (engine.stats().prompt_tokens, engine.stats().generated_tokens) == (27, 24)
    check_empty(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_request_is_aborted_wherever_it_is(steps: int) -> None:
    engine = engine_of(build_model(positions=256), **EAGER, max_num_batched_tokens=64)
    expected = serve(engine, [([7] * 20, GREEDY)])
    engine.add("gone", [3] * 100 if steps < 2 else [3], SamplingParams(50, 0.0, n=2))  # of 100 a step has a part
    engine.add("0", [7] * 20, GREEDY)
    answers: dict[Any, Answer] = {}
    for _ in range(steps):
        for delta in engine.step():
            answers.setdefault((delta.request_id, delta.index), Answer()).token_ids.extend(delta.token_ids)
    engine.abort("gone")
    engine.abort("gone")
    engine.abort("unknown")
    left = run_all(engine)
    assert [left["gone", i].finish_reason for i in (0, 1)] == ["abort", "abort"]
    tokens = answers.get(("0", 0), Answer()).token_ids + left["0", 0].token_ids
    assert (tokens, left["0", 0].finish_reason) == (expected[0].token_ids, "length")
    check_empty(engine)


def test_a_request_ends_at_its_deadline() -> None:
    now = [0.0]
    options = EngineOptions(**SMALL, **EAGER)
    engine = Engine.of_model(build_model(), byte_level_tokenizer(), options, clock=lambda: now[0])
    engine.add("a", [1, 2], SamplingParams(30, 0.0), deadline=5.0)
    engine.add("b", [1, 2], SamplingParams(30, 0.0))
    first = engine.step()
    now[0] = 6.0
    answers = run_all(engine)
    assert len(first) == 2 and answers["a", 0].finish_reason == "timeout" and answers["a", 0].token_ids == []
    assert answers["b", 0].finish_reason == "length" and len(answers["b", 0].token_ids) == 29
    check_empty(engine)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_step_that_fails_ends_its_requests_alone(
    engine: Engine, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [(prompt, GREEDY) for prompt in prompts(5, 300)]
    expected = serve(engine, given)
    fail_at(monkeypatch, number, RuntimeError("no memory"))
    assert {answer.finish_reason for answer in serve(engine, given)} == {"error"}
    assert serve(engine, given) == expected


def test_an_interrupt_leaves_nothing_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [(prompt, GREEDY) for prompt in prompts(3, 300)]
    expected = serve(engine, given)
    fail_at(monkeypatch, 2, KeyboardInterrupt())
    for number, (prompt, params) in enumerate(given):
        engine.add(str(number), prompt, params)
    with pytest.raises(KeyboardInterrupt):
        run_all(engine)
    check_empty(engine)
    assert not engine.has_requests
    assert serve(engine, given) == expected


def test_logits_that_are_not_finite_end_their_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [(prompt, GREEDY) for prompt in prompts(4, 300, 10)]
    expected = serve(engine, given)
    run, calls = ModelRunner.run, []

    def broken(runner: ModelRunner, step: Step) -> StepLogits:
        calls.append(step)
        logits = run(runner, step)
        if len(calls) == 3:
            logits.values[1] = torch.nan
        return logits

    monkeypatch.setattr(ModelRunner, "run", broken)
    answers = serve(engine, given)
    assert answers[1].finish_reason == "error" and answers[1].token_ids == expected[1].token_ids[:2]
    assert [answers[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


def test_what_cannot_be_served_is_refused(engine: Engine) -> None:
    """Museum 26."""
    with pytest.raises(RequestTooLongError, match="the prompt has 64 tokens; the model has 64 positions"):
        engine.add("a", [1] * 64, GREEDY)
    for prompt, words in (([], "the prompt has no tokens"), ([300], "prompt_token_ids has 300; the model's tokens")):
        with pytest.raises(ValueError, match=words):
            engine.add("a", prompt, GREEDY)
    with pytest.raises(ValueError, match="logit_bias has token 300"):
        engine.add("a", [1], SamplingParams(logit_bias={300: 1.0}))
    engine.add("a", [1], GREEDY)
    with pytest.raises(ValueError, match="request 'a' is served already"):
        engine.add("a", [1], GREEDY)
    run_all(engine)
    check_empty(engine)


def test_a_start_says_what_happens() -> None:
    phases: list[str] = []
    options = EngineOptions(kv_device_memory=1 << 20)
    Engine.of_model(build_model(), byte_level_tokenizer(), options, note=phases.append)
    assert [phase.split()[0] for phase in phases] == ["running", "making", "tracing"]


def test_of_several_answers_all_are_taken_or_none() -> None:
    engine = engine_of(build_model(), **EAGER, max_queued_requests=3)
    engine.add("a", [1], GREEDY)
    with pytest.raises(QueueFullError):
        engine.add("b", [1], SamplingParams(2, n=3))
    assert engine.stats().num_waiting == 1
    assert set(run_all(engine)) == {("a", 0)}
    check_empty(engine)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen3_next", "keeps more than keys and values of its attention: layers [1] of 2 call attention once"),
        ("lfm2_moe", "keeps more than keys and values of its attention: layers [1] of 2 call attention once"),
    ],
)
def test_models_that_keep_other_things_are_refused(family: str, words: str) -> None:
    model = tiny(family)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=re.escape(words)):
        engine_of(model, **EAGER)
    assert model.config._attn_implementation == before


def test_a_model_that_mixes_tokens_is_refused() -> None:
    model = build_model()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="gives a token other logits in other company"):
        engine_of(model, **EAGER)


def test_a_window_that_attention_is_not_told_of_is_refused() -> None:
    model = tiny("mixtral")
    assert model.config.sliding_window == 4
    engine_of(model, **EAGER)
    model = build_model()
    model.config.sliding_window = 16
    with pytest.raises(UnsupportedModelError, match="with a window of 16, and tells attention None"):
        engine_of(model, **EAGER)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_format": "int3"}, "kv_format is 'int3'; it must be one of auto, fp32"),
        ({"kv_device_memory": 0}, "kv_device_memory is 0"),
        ({"kv_device_memory": 100}, "the cache has 100 bytes; one block of 8 positions takes"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_model_len": 65}, "max_model_len is 65; the model has 64 positions"),
        ({"max_num_batched_tokens": 20}, "max_num_batched_tokens is 20; it must be 55 or more"),
        ({"dense_format": "int3"}, "dense_format"),
        ({"head_format": "int3"}, "head_format"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        engine_of(build_model(), **EAGER, **options)


def test_a_sequence_is_no_longer_than_the_memory() -> None:
    bytes_per_block = engine_of(build_model(), **EAGER)._runner.kv_bytes // (40 * 8)
    engine = engine_of(build_model(), **EAGER, kv_device_memory=4 * bytes_per_block)
    assert (engine.stats().num_blocks, engine.max_model_len) == (4, 32)
    (answer,) = serve(engine, [([1] * 30, SamplingParams(None, 0.0))])
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")
