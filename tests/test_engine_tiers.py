"""Keys and values from host memory and from disk give the bits of computing them, after a restart too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import SMALL, byte_level_tokenizer, memory_of, prompts, push_out, run_all, settle, tiny
from helpers.prefixes import GREEDY, LENGTH, PROMPT, SIZE, Watched, same
from helpers.text_model import build_model
from helpers.tiered_engine import FOUND, HOST, ask, engine_of, load_everything, tiers_of

from ktcompile.cache.rates import Rates
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampling_params import SamplingParams


@pytest.fixture(autouse=True)
def fresh(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    load_everything(monkeypatch)
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_every_tier_gives_the_bits_of_computing(family: str, tmp_path: Path) -> None:
    """Museum 16."""
    options = {"kv_host_memory": HOST, "kv_disk_path": tmp_path / "kv"}
    model: Any = tiny(family, torch.bfloat16)
    engine = engine_of(model, **options)
    cold, receipt = ask(engine, PROMPT)
    of_cold = engine.logits["0/0"]
    assert tiers_of(receipt) == (0, 0, 0)
    assert ask(engine, PROMPT)[0] == cold and same(engine.logits["0/0"], of_cold)
    push_out(engine.engine)
    answer, receipt = ask(engine, PROMPT)
    assert tiers_of(receipt) == (0, FOUND, 0) and answer == cold and same(engine.logits["0/0"], of_cold)
    # Some on the device, the rest in the host.
    push_out(engine.engine)
    ask(engine, PROMPT[: 3 * SIZE + 1], SamplingParams(1))
    answer, receipt = ask(engine, PROMPT)
    assert tiers_of(receipt) == (3 * SIZE, FOUND - 3 * SIZE, 0)
    assert answer == cold and same(engine.logits["0/0"], of_cold)
    engine.engine.close()

    again = engine_of(tiny(family, torch.bfloat16), **options)
    answer, receipt = ask(again, PROMPT)
    assert tiers_of(receipt) == (0, 0, FOUND) and receipt.disk_bytes > 0 and receipt.load_seconds > 0
    assert answer == cold and same(again.logits["0/0"], of_cold)
    # A part is in the host again, its end on disk alone; then one goes on from the answer.
    turn = [*PROMPT, *cold.token_ids, 3]
    (expected,) = again.serve((turn, GREEDY), salt="cold turn")
    of_turn = again.logits["0/0"]
    push_out(again.engine)
    answer, receipt = ask(again, turn)
    assert tiers_of(receipt) == (0, FOUND, (len(turn) - 1) // SIZE * SIZE - FOUND)
    assert answer == expected and same(again.logits["0/0"], of_turn)
    check_preemption(engine_of(tiny(family, torch.bfloat16), **_narrow(again, tmp_path)), cold, of_cold)
    again.engine.close()


def _narrow(engine: Watched, path: Path) -> dict[str, Any]:
    memory = memory_of(engine.engine, 144)
    few = {"max_num_batched_tokens": 47, "chunk_size": 8, "kv_device_memory": memory}
    return {"kv_host_memory": HOST, "kv_disk_path": path / "narrow", **few}


def check_preemption(engine: Watched, cold: Any, of_cold: Any) -> None:
    """Requests give up their blocks and have them back from wherever these are."""
    company = [(prompt, SamplingParams(20 + i, 0.7, seed=i)) for i, prompt in enumerate(prompts(6))]
    for _ in range(2):
        for number, (prompt, params) in enumerate([*company[:2], (PROMPT, GREEDY), *company[2:], (PROMPT, GREEDY)]):
            engine.engine.add(str(number), prompt, params)
        engine.logits.clear()
        answers = run_all(engine.engine, limit=20_000)
        assert answers["2", 0] == answers["7", 0] == cold
        assert same(engine.logits["2/0"], of_cold)
        settle(engine.engine)
    assert engine.engine.stats().num_preemptions > 0
    assert engine.engine.tier_counters()["promoted_host"] > 0
    engine.engine.close()


@pytest.mark.slow
def test_the_embedded_model_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Museum 12 and 16."""
    import ktcompile

    prompt = {"prompt_token_ids": list(range(100, 400))}
    params = SamplingParams(8, 0.0, ignore_eos=True)
    options: dict[str, Any] = {"kv_device_memory": 1 << 25, "kv_disk_path": str(tmp_path / "kv"), "max_num_seqs": 4}
    with ktcompile.LLM(**options) as llm:
        (cold,) = llm.generate(prompt, params)
    with ktcompile.LLM(**options) as llm:
        (warm,) = llm.generate(prompt, params)
    assert warm.outputs == cold.outputs
    assert cold.receipt is not None and warm.receipt is not None
    assert tiers_of(cold.receipt) == (0, 0, 0) and tiers_of(warm.receipt) == (0, 0, 256)
    assert warm.num_cached_tokens == 256


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return build_model(positions=256)


def again() -> Any:
    torch.manual_seed(0)
    return build_model(positions=256)


@pytest.mark.parametrize("host", [0, HOST])
def test_a_damaged_record_is_computed_anew(model: Any, tmp_path: Path, host: int) -> None:
    options = {"eager": True, "kv_host_memory": host, "kv_disk_path": tmp_path}
    engine = engine_of(model, **options)
    cold, _ = ask(engine, PROMPT)
    engine.engine.close()
    records = sorted(tmp_path.glob("*.ktkv"))
    assert len(records) == (len(PROMPT) + LENGTH - 1) // SIZE
    for record in records[:3]:
        content = bytearray(record.read_bytes())
        content[-1] ^= 1
        record.write_bytes(content)
    engine = engine_of(again(), **options)
    for _ in range(2):
        answer, _ = ask(engine, PROMPT)
        assert answer == cold
        push_out(engine.engine)
    assert engine.engine.tier_counters()["disk_verify_failed"] > 0
    engine.engine.close()


def test_a_tenant_finds_its_blocks_after_a_restart_and_no_other_does(model: Any, tmp_path: Path) -> None:
    options = {"eager": True, "kv_disk_path": tmp_path, "kv_host_memory": HOST}
    engine = engine_of(model, **options)
    ask(engine, PROMPT, salt="mine")
    engine.engine.close()
    engine = engine_of(again(), **options)
    assert tiers_of(ask(engine, PROMPT, salt="yours")[1]) == tiers_of(ask(engine, PROMPT)[1]) == (0, 0, 0)
    assert tiers_of(ask(engine, PROMPT, salt="mine")[1]) == (0, 0, FOUND)
    engine.engine.close()


def test_other_weights_or_options_find_nothing(model: Any, tmp_path: Path) -> None:
    options = {"eager": True, "kv_disk_path": tmp_path, "kv_host_memory": HOST}
    engine = engine_of(model, **options)
    ask(engine, PROMPT)
    engine.engine.close()
    for change in ({"kv_format": "int8"}, {"block_size": 4}):
        engine = engine_of(again(), **{**options, **change})
        assert tiers_of(ask(engine, PROMPT)[1]) == (0, 0, 0)
        engine.engine.close()
    other = EngineOptions(**{**SMALL, **options})
    engine = Watched(Engine.of_model(again(), byte_level_tokenizer(), other, weights="others"))
    assert tiers_of(ask(engine, PROMPT)[1]) == (0, 0, 0)
    engine.engine.close()


def test_what_is_not_finite_is_kept_by_no_tier(model: Any) -> None:
    engine = engine_of(model, eager=True, kv_host_memory=HOST, max_num_batched_tokens=64, chunk_size=16)
    run, calls = engine.engine._runner.run, []

    def broken(step: Any) -> Any:
        found = run(step)
        calls.append(step)
        if any(chunk.samples for chunk in step.chunks):
            found.values[:] = torch.nan
        return found

    engine.engine._runner.run = broken  # type: ignore[method-assign]
    prompt = [*PROMPT, *PROMPT]
    answer, _ = ask(engine, prompt)
    assert answer.finish_reason == "error" and len(calls) > 1, "a part was computed and kept before"
    assert engine.engine.tier_counters()["demoted"] > 0
    engine.engine._runner.run = run  # type: ignore[method-assign]
    assert tiers_of(ask(engine, prompt)[1]) == (0, 0, 0)
    engine.engine.close()


def test_a_load_that_never_comes_ends_with_its_deadline(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Museum 13."""
    engine = engine_of(model, eager=True, kv_host_memory=HOST)
    cold, _ = ask(engine, PROMPT)
    push_out(engine.engine)
    monkeypatch.setattr(Rates, "seconds", lambda *_: 0.2)
    monkeypatch.setattr(engine.engine._tiers._loaders, "submit", lambda job: True)
    engine.engine.add("other", [5, 6, 7], replace(GREEDY, max_tokens=3))
    began = time.process_time()
    answer, receipt = ask(engine, PROMPT)
    assert answer == cold and tiers_of(receipt) == (0, 0, 0)
    assert receipt.load_seconds >= 0.2 and receipt.saved_seconds < 0
    assert time.process_time() - began < 20
    engine.engine.close()


def test_a_request_that_is_loading_may_be_aborted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Museum 10."""
    engine = engine_of(model, eager=True, kv_host_memory=HOST)
    ask(engine, PROMPT)
    push_out(engine.engine)
    monkeypatch.setattr(engine.engine._tiers._loaders, "submit", lambda job: True)
    engine.engine.add("0", PROMPT, GREEDY)
    assert engine.engine.step() == [] and engine.engine.stats().num_running == 1
    engine.engine.abort("0")
    (delta,) = engine.engine.step()
    assert delta.finish_reason == "abort" and delta.receipt is None
    settle(engine.engine)
    assert not engine.engine.has_requests
    engine.engine.close()


def test_no_thread_is_left_and_none_works_while_nothing_comes(model: Any, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    engine = engine_of(model, eager=True, kv_host_memory=HOST, kv_disk_path=tmp_path)
    ask(engine, PROMPT)
    mine = {thread.name for thread in set(threading.enumerate()) - before}
    assert mine == {"ktcompile-kv-load-0", "ktcompile-kv-load-1", "ktcompile-kv-store-0"}
    began = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - began < 0.05
    engine.engine.close()
    engine.engine.close()
    assert set(threading.enumerate()) <= before
    answer, receipt = ask(engine, PROMPT)
    assert len(answer.token_ids) == LENGTH and receipt.prompt_tokens == len(PROMPT)


def test_a_folder_that_others_may_write_to_is_refused(model: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=r"kv_disk_path is .*, which cannot be used: .*other users may write to it"):
        engine_of(model, eager=True, kv_disk_path=tmp_path)
