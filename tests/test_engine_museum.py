"""Failures that other engines had with their prefix caches, re-enacted; decision 23 has the list of all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import engine_of as plain_engine_of
from helpers.engines import memory_of, push_out, run_all, settle, tiny
from helpers.prefixes import GREEDY, PROMPT, SIZE, same
from helpers.servers import call, running
from helpers.text_model import build_model
from helpers.tiered_engine import FOUND, HOST, ask, engine_of, load_everything, tiers_of

from ktcompile.engine import namespace


@pytest.fixture(autouse=True)
def fresh(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    load_everything(monkeypatch)
    yield
    torch._dynamo.reset()


def model() -> Any:
    torch.manual_seed(0)
    return build_model(positions=256)


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", ["auto", "int8"])
def test_forty_greedy_answers_are_the_same_with_hits_of_every_tier(kv_format: str, tmp_path: Path) -> None:
    """Museum 9 and 16: 18 of 40 changed elsewhere; with int8, whose scales lie beside keys and values, state that
    covered fewer tokens than these would change them, too."""
    rng = random.Random(3)
    beginnings = [[rng.randrange(97) for _ in range(length)] for length in (9, 17, 30, 41, 64)]
    given = [rng.choice(beginnings) + [rng.randrange(97) for _ in range(rng.randint(1, 14))] for _ in range(40)]
    options: dict[str, Any] = {"kv_format": kv_format, "kv_host_memory": HOST, "kv_disk_path": tmp_path / "kv"}
    alone = engine_of(model(), kv_format=kv_format, enable_prefix_caching=False)
    cold = []
    for prompt in given:
        (answer,) = alone.serve((prompt, GREEDY), salt="")
        cold.append((answer, dict(alone.logits["0/0"])))
    engine = engine_of(model(), **options)

    def check(which: str) -> None:
        before = engine.engine.stats().prefix_cache_hits
        for begin in range(0, 40, 8):
            engine.logits.clear()
            for i in range(begin, begin + 8):
                engine.engine.add(str(i), given[i], GREEDY)
            answers = run_all(engine.engine)
            settle(engine.engine)
            for i in range(begin, begin + 8):
                wanted, logits = cold[i]
                assert answers[str(i), 0] == wanted and same(engine.logits[f"{i}/0"], logits), f"{which}: answer {i}"
        assert engine.engine.stats().prefix_cache_hits > before

    check("device, as blocks come to be")
    check("device")
    push_out(engine.engine)
    check("host")
    engine.engine.close()
    engine = engine_of(model(), **options)
    check("disk")
    counters = engine.engine.tier_counters()
    assert counters["promoted_disk"] > 0 and counters["disk_verify_failed"] == 0
    engine.engine.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_prompt_of_one_block_is_a_hit(family: str) -> None:
    """Museum 17: where layers differ, short prompts never were elsewhere. Here a block has all layers, those with
    windows among them, so what counts is its size alone."""
    engine = engine_of(tiny(family), eager=True, kv_host_memory=HOST)
    prompt = list(range(SIZE))
    ask(engine, [*prompt, 50])
    assert tiers_of(ask(engine, [*prompt, 51])[1]) == (SIZE, 0, 0)
    push_out(engine.engine)
    assert tiers_of(ask(engine, [*prompt, 52])[1]) == (0, SIZE, 0)
    assert tiers_of(ask(engine, prompt)[1]) == (0, 0, 0), "the last position is computed"
    engine.engine.close()


def test_what_is_the_engines_own_is_in_no_key(tmp_path: Path, threads: Callable[[int], None]) -> None:
    """Museum 19: with the sizes of pools, a path or a process in the key nothing was ever found."""
    engine = engine_of(model(), eager=True, kv_disk_path=tmp_path / "here", kv_host_memory=0)
    ask(engine, PROMPT)
    memory = memory_of(engine.engine, 128)
    engine.engine.close()
    (tmp_path / "here").rename(tmp_path / "there")
    other: dict[str, Any] = {
        "kv_device_memory": memory,
        "kv_host_memory": HOST,
        "kv_disk_size": 1 << 20,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 31,
        "max_model_len": 100,
        "chunk_size": 8,
        "max_queued_requests": 7,
    }
    threads(2)
    again = engine_of(model(), eager=True, kv_disk_path=tmp_path / "there", **other)
    assert tiers_of(ask(again, PROMPT)[1]) == (0, 0, FOUND)
    again.engine.close()


@pytest.mark.parametrize("what", ["_NUMERICS", "ktcompile", "torch", "transformers"])
def test_another_release_finds_nothing(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Museum 18: records of another build of the engine were served."""
    engine = engine_of(model(), eager=True, kv_disk_path=tmp_path)
    ask(engine, PROMPT)
    engine.engine.close()
    if what == "_NUMERICS":
        monkeypatch.setattr(namespace, what, 1000)
    else:
        monkeypatch.setattr(getattr(namespace, what), "__version__", "0.0.0")
    other = engine_of(model(), eager=True, kv_disk_path=tmp_path)
    assert tiers_of(ask(other, PROMPT)[1]) == (0, 0, 0)
    other.engine.close()


def test_no_salt_and_no_length_ends_a_server_or_vanishes(tmp_path: Path) -> None:
    """Museum 22 and 26: a salt that could not be used ended the engine, and prompts that were too long were dropped
    without a word."""
    engine = plain_engine_of(model(), eager=True, kv_disk_path=tmp_path / "kv")
    body: dict[str, Any] = {"model": engine.model_name, "prompt": PROMPT, "max_tokens": 2}
    with running(engine) as server:
        for salt in ("s" * 257, "\u00e9" * 200, "", 5, ["a"], {"a": 1}, True):
            for stream in (False, True):
                reply = call(server, "/v1/completions", {**body, "cache_salt": salt, "stream": stream})
                assert reply.status in (400, 422) and "cache_salt" in reply.json["error"]["message"], salt
        for salt in ("../../../tmp/x", "\x00", "\ud800", "s" * 256):
            reply = call(server, "/v1/completions", {**body, "cache_salt": salt})
            assert reply.status in (200, 400, 422), salt
        for stream in (False, True):
            reply = call(server, "/v1/completions", {**body, "prompt": [5] * 300, "stream": stream})
            assert reply.status == 400 and reply.json["error"]["code"] == "context_length_exceeded"
        several = {**body, "prompt": [PROMPT, [5] * 300]}
        assert call(server, "/v1/completions", several).json["error"]["code"] == "context_length_exceeded"
        assert call(server, "/health").json == {"status": "ready"}
        assert call(server, "/v1/completions", body).json["usage"]["completion_tokens"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"kv"}
    assert all(path.parent == tmp_path / "kv" for path in tmp_path.rglob("*.ktkv"))
