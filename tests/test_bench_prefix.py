"""`ktc bench cache --engines`: what is sent to engines, in which order, and what is made of their answers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.fake_vllm import FAKE_VLLM

from ktcompile.bench.cache import synthetic
from ktcompile.bench.model.process import Loaded
from ktcompile.bench.prefix import contenders, run, traffic
from ktcompile.bench.prefix.contenders import Capacity, EngineContender
from ktcompile.bench.prefix.process import Answer, Settings
from ktcompile.bench.prefix.report import EnginesReport
from ktcompile.bench.prefix.traffic import Sizes
from ktcompile.bench.process import ContenderError
from ktcompile.bench.serve.trace import TraceRequest
from ktcompile.cli import main

SIZES = Sizes(12, 200, 1 / 8, 0.02, 4096)
CAPACITY = Capacity(memory=1024, host=256, disk=4096, block=64, token_bytes=10)
SETTINGS = Settings(Path("model"), CAPACITY, 200, 1, 60.0)
KT, OFF, VLLM = (EngineContender(n, *n.partition(":")[::2], "python") for n in ("kt", "kt:off", "vllm"))
BENCH = ["bench", "cache", "--engines"]


class FakeProcess:
    """An engine that takes a millisecond for each token that it does not find. vllm takes three, and chooses others;
    it finds what begins as the prompt before. With the cache off nothing is found, and a tenth of the time is lost."""

    def __init__(self, log, behaviour, contender):
        self.log, self.behaviour, self.contender, self.before = log, behaviour, contender, []

    def set_up(self):
        self._behave("set up")
        return Loaded(5.0, 100, {"torch": "2"}, {"kv_blocks": 16})

    def first(self, prompt):
        self.log.append((self.contender.name, len(prompt)))
        self._behave(len([name for name, _ in self.log if name == self.contender.name]))
        same = next((i for i, (a, b) in enumerate(zip(prompt, self.before, strict=False)) if a != b), 0)
        found = 0 if self.contender == OFF else same // 64 * 64
        self.before = prompt
        rate = {KT: 1e-3, OFF: 1.1e-3, VLLM: 3e-3}[self.contender]
        seconds = (len(prompt) - found) * rate
        return Answer(seconds, seconds + 0.5, 2 * seconds, int(self.contender == VLLM), {"device": found})

    def close(self):
        self.log.append((self.contender.name, "closed"))

    def _behave(self, what):
        if (self.contender, what) in self.behaviour:
            raise self.behaviour[self.contender, what]


class Listener:
    def __init__(self):
        self.turns, self.saved = 0, []

    def note(self, text):
        pass

    def advance(self, turns):
        self.turns += turns

    def save(self, report):
        self.saved.append(report)


def replay(behaviour=None, who=(KT, OFF, VLLM), kinds=("chat", "nothing")):
    log, listener = [], Listener()
    workloads = {kind: traffic.of_kind(kind, SIZES, seed) for seed, kind in enumerate(kinds)}
    wanted = run.EnginesBenchmark("small", SETTINGS, who, workloads, {})
    folders = []

    def start(contender, settings, folder):
        folders.append(folder)
        return FakeProcess(log, behaviour or {}, contender)

    report = run.run(wanted, {}, listener, start)
    assert report.interrupted or listener.turns == wanted.turns
    assert len(set(folders)) == len(folders) and not any(folder.parent.exists() for folder in folders)
    return report, log, listener


def test_each_prompt_goes_to_all_engines_which_begin_by_turns():
    report, log, listener = replay()
    names = [name for name, _ in log]
    assert names[:6] == ["kt", "kt", "kt:off", "kt:off", "vllm", "vllm"]  # the warm-up
    assert names[6:15] == ["kt", "kt:off", "vllm", "kt:off", "vllm", "kt", "vllm", "kt", "kt:off"]
    assert sorted(log[-3:]) == [("kt", "closed"), ("kt:off", "closed"), ("vllm", "closed")]
    of_chat = [s for s in report.served if s.trace == "chat"]
    assert len(of_chat) == 36 and all(s.tokens <= 200 for s in of_chat)
    assert {s.index: s.tokens for s in of_chat if s.contender == "kt"} == {
        s.index: s.tokens for s in of_chat if s.contender == "vllm"
    }
    assert len(listener.saved) == 20 and listener.saved[-1] == report
    assert report.starts["vllm"].kv_tokens == 16 * 64


def test_results_are_sums_and_ratios_over_the_first():
    report, *_ = replay()
    by_name = {(r.trace, r.contender): r for r in report.results}
    assert len(by_name) == 6
    own, peer = by_name["chat", "kt"], by_name["chat", "vllm"]
    assert own.ratios is None and own.cached["device"] > 0 and own.cached["host"] == 0
    assert own.prefill_seconds == pytest.approx((own.tokens - own.cached["device"]) / 1e3)
    assert own.wall_seconds == pytest.approx(own.prefill_seconds + 12 * 0.5)
    assert own.hit_rate == own.cached["device"] / own.tokens
    assert peer.ratios.prefill == pytest.approx(3) and peer.ratios.same_tokens == 0
    loss = by_name["nothing", "kt:off"].ratios
    assert (loss.prefill, loss.paired, loss.cpu) == (pytest.approx(1.1), pytest.approx(1.1), pytest.approx(1.1))
    assert loss.same_tokens == 1
    chat, nothing = report.traces
    assert chat.shared_tokens >= own.cached["device"] and nothing.shared_tokens == 0
    assert EnginesReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    with pytest.raises(ValueError, match="a part is missing"):
        EnginesReport.from_json({**report.to_json(), "served": [{}]})


def test_an_engine_that_fails_is_asked_no_more_and_what_it_did_counts():
    # The third prompt behind the two that do not count.
    report, log, _ = replay({(VLLM, 5): ContenderError("no memory")})
    assert report.skipped == {"vllm": "ended at prompt 3 of chat: no memory"}
    assert [s.index for s in report.served if s.contender == "vllm"] == [0, 1]
    results = {(r.trace, r.contender): r for r in report.results}
    # Ratios are of the prompts of both.
    assert results["chat", "vllm"].requests == 2 and results["chat", "vllm"].ratios.prefill == pytest.approx(3)
    assert ("nothing", "vllm") not in results and results["nothing", "kt"].requests == 12
    assert log.count(("vllm", "closed")) == 2  # and at the end, which does nothing


def test_an_engine_that_does_not_start_leaves_the_others():
    report, *_ = replay({(KT, "set up"): ContenderError("cannot")})
    assert report.skipped == {"kt": "cannot"} and "kt" not in report.starts
    assert {r.contender: r.ratios for r in report.results} == {"kt:off": None, "vllm": None}


def test_what_was_measured_before_ctrl_c_is_kept():
    report, log, _ = replay({(OFF, 4): KeyboardInterrupt()})
    assert report.interrupted and [(s.contender, s.index) for s in report.served] == [
        *(("kt", 0), ("kt:off", 0), ("vllm", 0))
    ]
    assert ("vllm", "closed") in log


def test_prompts_are_short_enough_and_share_what_the_trace_shares():
    trace = [
        TraceRequest(0.0, 1024, 1, (1, 2)),
        TraceRequest(1.0, 1600, 1, (1, 2, 3, 4)),
        TraceRequest(2.0, 5000, 1, tuple(range(5, 15))),
        TraceRequest(3.0, 1100, 1, (1, 9, 8)),
    ]
    found = traffic.of_trace("t", trace, SIZES, 0)
    first, second, last = traffic.prompts(found)
    assert (len(first), len(second), len(last)) == (128, 200, 138)
    assert second[:128] == first and last[:64] == first[:64] and last[64:] != first[64:]
    assert all(300 <= token < 4000 for token in second)
    assert traffic.shared_tokens(found) == 128 + 64
    assert [len(p) for p in traffic.prompts(traffic.of_trace("t", trace, replace(SIZES, requests=1), 0))] == [128]
    with pytest.raises(ValueError, match="t has no prompt that is short enough; raise --longest"):
        traffic.of_trace("t", trace, replace(SIZES, longest=100), 0)
    small = traffic.of_trace("t", trace, replace(SIZES, vocab_size=80), 0)
    assert all(10 <= token < 80 for prompt in traffic.prompts(small) for token in prompt)


def test_small_crowds_share_more_and_whole_ones_are_as_they_were():
    assert synthetic.generate("chat", 20, 1, 1.0) == synthetic.generate("chat", 20, 1)
    for kind in ("chat", "documents", "agents", "system-prompts"):
        sizes = replace(SIZES, requests=60, longest=16_000)
        full, few = (traffic.of_kind(kind, replace(sizes, crowd=crowd), 1) for crowd in (1.0, 0.02))
        assert len(full.requests) == len(few.requests) == 60
        assert traffic.shared_tokens(few) > traffic.shared_tokens(full), kind
    with pytest.raises(ValueError, match="not of a crowd of 2"):
        synthetic.generate("chat", 20, 1, 2.0)


def test_all_engines_have_the_same_memory():
    told = {name: CAPACITY.options(EngineContender(name, *name.partition(":")[::2], ""), "folder") for name in NAMES}
    assert told["kt"] == {"enable_prefix_caching": True, "block_size": 64, "kv_device_memory": 10240}
    assert told["kt:off"] == {**told["kt"], "enable_prefix_caching": False}
    tiers = told["kt:tiers"]
    assert tiers["kv_device_memory"] + tiers["kv_host_memory"] == 10240
    assert (tiers["kv_disk_path"], tiers["kv_disk_size"]) == ("folder", 40960)
    assert told["vllm"]["kv_cache_memory_bytes"] == 10240 + 640
    assert (told["vllm"]["enable_prefix_caching"], told["vllm:off"]["enable_prefix_caching"]) == (True, False)
    with pytest.raises(ValueError, match="768 tokens on the device are too few for prompts of 800"):
        replace(SETTINGS, longest=800)


NAMES = ("kt", "kt:tiers", "kt:off", "vllm", "vllm:off")


def test_engines_are_chosen_by_name(monkeypatch):
    monkeypatch.setattr(contenders, "is_installed", lambda python, package: package == "ktcompile")
    (one,) = contenders.choose(["kt:tiers", "kt:tiers"], {}, sys.executable)
    assert (one.kind, one.variant, one.python, one.ours) == ("kt", "tiers", sys.executable, True)
    for names, pythons, words in (
        (["kt:best"], {}, "engine 'kt:best' is unknown; there are kt, kt:tiers"),
        (["vllm"], {}, "vllm is not installed"),
        (["kt"], {"llama": "python"}, "--peer-python names 'llama'"),
    ):
        with pytest.raises(ValueError, match=words):
            contenders.choose(names, pythons, sys.executable)


def test_the_command_runs_an_engine_with_tiers_beside_a_peer(capsys, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    wanted = ["--traffic", "chat", "--requests", "5", "--longest", "300", "--kv-tokens", "640", "--threads", "1"]
    assert main([*BENCH, "kt:tiers", "vllm", *wanted, "--out", str(out), "--plot", str(png)]) == 0
    printed, err = capsys.readouterr()
    found = EnginesReport.from_json(json.loads(out.read_text()))
    assert not found.skipped and not found.interrupted and len(found.served) == 10
    assert {name: start.kv_tokens for name, start in found.starts.items()}["kt:tiers"] == 512
    ours, peer = found.results
    (trace,) = found.traces
    assert 0 < sum(ours.cached.values()) <= trace.shared_tokens
    assert sum(peer.cached.values()) == trace.shared_tokens  # it forgets nothing
    assert all(s.wall_seconds >= s.seconds > 0 and s.cpu_seconds > 0 for s in found.served)
    for word in ("chat: 5 prompts", "kt:tiers", "paired /", "tokens that devices have room for: kt:tiers 512"):
        assert word in printed
    assert f"wrote {out}" in err and png.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    assert main(["bench", "cache", "--replot", str(out), "--plot", str(again)]) == 0 and again.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engines", "best"], "engine 'best' is unknown"),
        (["--engines", "kt", "--policies", "lru"], "--policies, --capacities and --tiers are simulated"),
        (["--kv-tokens", "100"], "--kv-tokens is of engines; name them with --engines"),
        (["--engines", "kt", "--kv-tokens", "100"], "80 tokens on the device are too few"),
        (["--engines", "kt", "--threads", "0"], "--threads of 0"),
        (["--engines", "kt", "--traffic", "best"], "traffic 'best' is unknown"),
        (["--engines", "kt", "--peer-python", "vllm"], "--peer-python 'vllm' is none"),
        (["--engines", "kt", "--longest", "0"], "requests of at most 0 tokens cannot be"),
        (["--replot", __file__, "--plot", "x.png"], "cannot be drawn"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "cache", "--requests", "5", *arguments]) == 2
    assert words in capsys.readouterr().err
