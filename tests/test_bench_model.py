"""A benchmark of whole models with contenders that compute nothing and a machine that is always the same."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.model_reports import DECODE, FLOAT, MODEL, OURS, PEER, PREFILL, THIRD

from ktcompile.bench.model import run as model_run
from ktcompile.bench.model.demand import Work
from ktcompile.bench.model.process import Loaded, Settings
from ktcompile.bench.model.run import ModelBenchmark
from ktcompile.bench.process import ContenderError
from ktcompile.bench.roofline import Ceilings

SETTINGS = Settings(Path("model"), (DECODE, PREFILL), 4, 1, "dynamic", Path("gguf"), {}, 60.0)


class FakeProbe:
    """Counts 1, 2, 3, ... GB/s."""

    def __init__(self, threads, arithmetics):
        assert set(arithmetics) == {FLOAT}
        self.count = itertools.count(1)

    def measure(self):
        return Ceilings(next(self.count) * 1e9, {FLOAT: 1e9})


class FakeProcess:
    """Each call takes as many seconds as the work has tokens, of the peer twice as many."""

    def __init__(self, log, behaviour, contender):
        self.log, self.behaviour, self.name, self.alive = log, behaviour, contender.name, True

    def set_up(self):
        self.log.append(("set up", self.name))
        self._behave("set up", self.name)
        facts = {"expert_bytes": 1.0, "dense_bytes": 1.5} if self.name == THIRD.name else {}
        return Loaded(5.0, 100, {"torch": "2"}, facts)

    def time(self, work, turn, steps):
        self.log.append((self.name, str(work), turn, steps))
        self._behave("time", self.name, str(work), turn)
        seconds = float(work.size) * (1 if self.name == OURS.name else 2)
        tokens = [1, 2, 3, 4 if self.name == OURS.name else 5] if work == DECODE else []
        return [seconds] * 3, tokens, 100 + turn

    def logits(self):
        self._behave("logits", self.name)
        if self.name == THIRD.name:
            raise ContenderError("it gives none")
        return np.array([3.0, 4.0] if self.name == OURS.name else [3.0, 3.5], np.float32)

    def close(self):
        self.alive = False
        self.log.append(("close", self.name))

    def _behave(self, *what):
        if what in self.behaviour:
            error, self.alive = self.behaviour[what]
            raise error


class Listener:
    def __init__(self):
        self.turns, self.saved = 0, []

    def note(self, text):
        pass

    def advance(self, turns):
        self.turns += turns

    def save(self, report):
        self.saved.append(report)


def benchmark(groups=((OURS, PEER),), rounds=2, once_above=1000.0):
    return ModelBenchmark(MODEL, SETTINGS, groups, {"zentorch": "not installed"}, rounds, once_above)


def run(behaviour=None, **others):
    log, listener, wanted = [], Listener(), benchmark(**others)

    def start(contender, settings):
        assert settings is SETTINGS
        return FakeProcess(log, behaviour or {}, contender)

    report = model_run.run(wanted, {}, listener, start, FakeProbe)
    assert report.interrupted or listener.turns == wanted.turns
    return report, log, listener


def timed(log):
    """Return (contender, work, turn) of the turns that count."""
    return [entry[:3] for entry in log if len(entry) == 4 and entry[2] >= 0]


def test_contenders_take_turns_and_begin_by_turns():
    report, log, listener = run()
    kt, peer = OURS.name, PEER.name
    assert log[:6] == [
        *(("set up", kt), (kt, "decode 4", -1, 2), (kt, "prefill 32", -1, 2)),
        *(("set up", peer), (peer, "decode 4", -1, 2), (peer, "prefill 32", -1, 2)),
    ]
    assert timed(log) == [
        *((kt, "decode 4", 0), (peer, "decode 4", 0), (kt, "prefill 32", 0), (peer, "prefill 32", 0)),
        *((peer, "decode 4", 1), (kt, "decode 4", 1), (peer, "prefill 32", 1), (kt, "prefill 32", 1)),
    ]
    assert sorted(log[-2:]) == [("close", kt), ("close", peer)]
    assert [len(saved.turns) for saved in listener.saved] == [4, 8]
    assert report == listener.saved[-1] and not report.interrupted
    assert report.skipped == {"zentorch": "not installed"}
    assert [(r.contender, str(r.work), r.seconds, r.rounds) for r in report.results] == [
        *((kt, "decode 4", 4, 2), (peer, "decode 4", 8, 2)),
        *((kt, "prefill 32", 32, 2), (peer, "prefill 32", 64, 2)),
    ]
    assert report.results[0].ratios == {peer: 2.0}
    assert report.agreement == {peer: 0.75}
    assert report.logit_errors == {peer: pytest.approx(0.1)}


def test_a_turn_lies_between_two_measurements_and_first_turns_do_not():
    report, *_ = run(rounds=1)
    # 1, kt, 2, peer, 3 at the one; 4, kt, 5, peer, 6 at the other.
    assert [t.bandwidth for t in report.turns] == [1.5e9, 2.5e9, 4.5e9, 5.5e9]
    assert report.best == Ceilings(6e9, {FLOAT: 1e9})
    start = report.starts[OURS.name]
    assert (start.load_seconds, start.resident_bytes, start.peak_bytes) == (5.0, 100, 100)
    assert start.first_seconds.keys() == {"decode 4", "prefill 32"}


def test_what_a_library_says_of_its_weights_decides_what_it_must_read():
    report, *_ = run(groups=((OURS, THIRD),))
    assert [(c.expert_bytes, c.dense_bytes) for c in report.contenders] == [(2, 2), (1, 1.5)]
    ours, third = (report.demands[name]["prefill 32"] for name in (OURS.name, THIRD.name))
    assert third.bytes < ours.bytes and third.flops == ours.flops


@pytest.mark.parametrize("alive", [True, False])
def test_a_contender_that_cannot_be_loaded_is_left_out(alive):
    report, log, _ = run({("set up", PEER.name): (ContenderError("no such CPU"), alive)})
    assert report.skipped[PEER.name] == "no such CPU"
    assert [c.name for c in report.contenders] == [OURS.name] and PEER.name not in report.starts
    assert {name for name, *_ in timed(log)} == {OURS.name} and len(report.turns) == 4


def test_a_contender_that_ends_keeps_what_it_has_and_is_asked_no_more():
    report, log, _ = run({("time", PEER.name, "prefill 32", 0): (ContenderError("ended by SIGKILL"), False)})
    assert report.skipped[PEER.name] == "ended at prefill 32: ended by SIGKILL"
    assert [t.work for t in report.turns if t.contender == PEER.name] == [DECODE]
    assert len([t for t in report.turns if t.contender == OURS.name]) == 4
    assert timed(log).count((PEER.name, "decode 4", 1)) == 0


def test_what_a_contender_cannot_do_is_left_out_alone():
    problem = ContenderError("too long")
    report, *_ = run({("time", PEER.name, "prefill 32", -1): (problem, True)})
    assert report.skipped[PEER.name] == "prefill 32: too long"
    assert [(t.work, t.round) for t in report.turns if t.contender == PEER.name] == [(DECODE, 0), (DECODE, 1)]
    assert report.starts[PEER.name].first_seconds.keys() == {"decode 4"}


def test_a_long_call_has_one_round_in_each_group():
    report, *_ = run(groups=((OURS, PEER), (OURS, THIRD)), once_above=20.0)
    assert [t.round for t in report.turns if (t.contender, t.work) == (OURS.name, PREFILL)] == [0, 2]
    assert [t.round for t in report.turns if (t.contender, t.work) == (OURS.name, DECODE)] == [0, 1, 2, 3]
    assert [t.round for t in report.turns if (t.contender, t.work) == (THIRD.name, PREFILL)] == [2]


def test_the_first_contender_is_in_all_groups_and_the_others_leave_memory():
    report, log, _ = run(groups=((OURS, PEER), (OURS, THIRD)))
    assert log.count(("set up", OURS.name)) == 1
    assert log.index(("close", PEER.name)) < log.index(("set up", THIRD.name)) < log.index(("close", OURS.name))
    assert {t.round for t in report.turns if t.contender == THIRD.name} == {2, 3}
    (decode, *_) = (r for r in report.results if r.contender == OURS.name)
    assert decode.rounds == 4 and decode.ratios == {PEER.name: 2.0, THIRD.name: 2.0}


@pytest.mark.parametrize("when", [("set up", PEER.name), ("time", PEER.name, "decode 4", 1)])
def test_ctrl_c_keeps_what_there_is(when):
    report, log, _ = run({when: (KeyboardInterrupt(), True)})
    assert report.interrupted and ("close", OURS.name) in log and ("close", PEER.name) in log
    assert len(report.turns) == (4 if when[0] == "time" else 0)
    assert [c.name for c in report.contenders] == [OURS.name, PEER.name][: 2 if when[0] == "time" else 1]


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="--rounds of 0"):
        benchmark(rounds=0)
    for change, message in (
        ({"steps": 0}, "--steps of 0"),
        ({"threads": -1}, "--threads of -1"),
        ({"works": ()}, "nothing to measure"),
        ({"works": (Work("decode", 0),)}, "batches and prompts of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SETTINGS, **change)
