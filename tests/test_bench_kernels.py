"""A benchmark of kernels with contenders that compute nothing and a machine that is always the same."""

from __future__ import annotations

import itertools

import pytest
from helpers.kernels_reports import FLOAT, OURS, PEER, SHAPE, contender

from ktcompile.bench import kernels
from ktcompile.bench.kernels import KernelsBenchmark, _reference
from ktcompile.bench.process import ContenderError
from ktcompile.bench.roofline import Ceilings

RIGHT = _reference(SHAPE).tolist()


class FakeProbe:
    """Counts 1, 2, 3, ... GB/s."""

    def __init__(self, threads, arithmetics):
        assert set(arithmetics) == {FLOAT}
        self.count = itertools.count(1)

    def measure(self):
        return Ceilings(next(self.count) * 1e9, {FLOAT: 1e9})


class FakeProcess:
    """Each call of `time` takes as many seconds as there are tokens."""

    log: list

    def __init__(self, log, behaviour):
        self.log, self.behaviour = log, behaviour

    def set_up(self, contenders, shape, max_tokens):
        self.log.append(("set up", tuple(c.name for c in contenders)))
        self._behave("set up", contenders[0].name)
        return {}

    def rows(self, name, tokens):
        self._behave("rows", name)
        wrong = self.behaviour.get(("wrong", name), 0)
        return [[value * (1 + wrong) for value in row] for row in RIGHT]

    def time(self, name, tokens, turn, budget):
        self.log.append(("time", name, tokens, turn))
        self._behave("time", name, tokens, turn)
        return [float(tokens)] * 3, [2, 2, 5]

    def close(self):
        self.log.append("close")

    def _behave(self, *what):
        if what in self.behaviour:
            raise self.behaviour[what]


class Listener:
    def __init__(self):
        self.turns, self.saved = 0, []

    def note(self, text):
        pass

    def advance(self, turns):
        self.turns += turns

    def save(self, report):
        self.saved.append(report)


def run(behaviour=None, contenders=(OURS, PEER), shapes=("a",), tokens=(1, 4), rounds=2):
    log, listener = [], Listener()
    benchmark = KernelsBenchmark(
        shapes=dict.fromkeys(shapes, SHAPE),
        cut_experts=True,
        contenders=contenders,
        tokens=tokens,
        absent={"kt-kernel-int4": "not installed"},
        threads=1,
        rounds=rounds,
    )
    report = kernels.run(benchmark, {}, listener, lambda: FakeProcess(log, behaviour or {}), FakeProbe)
    return report, log, listener, benchmark


def timed(log):
    return [entry[1:] for entry in log if entry[0] == "time"]


def test_contenders_take_turns_and_begin_by_turns():
    report, log, listener, benchmark = run()
    ours, peer = OURS.name, PEER.name
    assert timed(log) == [
        *((ours, 1, 0), (peer, 1, 0), (ours, 4, 0), (peer, 4, 0)),
        *((peer, 1, 1), (ours, 1, 1), (peer, 4, 1), (ours, 4, 1)),
    ]
    assert log.count("close") == 2
    assert listener.turns == benchmark.turns == 8
    assert [len(r.shapes[0].turns) for r in listener.saved] == [4, 8]
    assert not report.interrupted and report == listener.saved[-1]
    (shape,) = report.shapes
    assert shape.skipped == {"kt-kernel-int4": "not installed"}
    assert [c.error for c in shape.contenders] == [0, 0]
    assert [(r.tokens, r.seconds) for r in shape.results] == [(1, 1), (1, 1), (4, 4), (4, 4)]


def test_a_turn_lies_between_two_measurements():
    report, *_ = run(rounds=1)
    (shape,) = report.shapes
    # 1, turn, 2, turn, 3 at one token; 4, turn, 5, turn, 6 at four.
    assert [t.bandwidth for t in shape.turns] == [1.5e9, 2.5e9, 4.5e9, 5.5e9]
    assert shape.best == Ceilings(6e9, {FLOAT: 1e9})
    assert (shape.turns[0].calls, shape.turns[0].distinct_experts) == (3, 3)


def test_a_wrong_result_is_not_timed():
    report, log, listener, benchmark = run({("wrong", PEER.name): 0.02, ("wrong", OURS.name): 0.01})
    (shape,) = report.shapes
    assert shape.skipped[PEER.name] == "its result is wrong: the relative error is 0.02, 0.012 is allowed"
    assert [c.error for c in shape.contenders] == [pytest.approx(0.01)]
    assert {name for name, *_ in timed(log)} == {OURS.name}
    assert listener.turns == benchmark.turns
    nan, *_ = run({("wrong", PEER.name): float("nan")})
    assert "relative error is nan" in nan.shapes[0].skipped[PEER.name]


@pytest.mark.parametrize("when", [("set up", PEER.name), ("rows", PEER.name)])
def test_a_peer_that_cannot_be_set_up_is_left_out(when):
    report, log, listener, benchmark = run({when: ContenderError("no such CPU")})
    (shape,) = report.shapes
    assert shape.skipped[PEER.name] == "no such CPU"
    assert len(timed(log)) == 4 and listener.turns == benchmark.turns
    assert log.count("close") == 2


def test_a_contender_that_ends_keeps_what_it_has():
    report, _, listener, benchmark = run({("time", PEER.name, 4, 0): ContenderError("out of memory")})
    (shape,) = report.shapes
    assert shape.skipped[PEER.name] == "ended at 4 tokens: out of memory"
    assert [(t.tokens, t.round) for t in shape.turns if t.contender == PEER.name] == [(1, 0)]
    assert len([t for t in shape.turns if t.contender == OURS.name]) == 4
    assert [r.tokens for r in shape.results if r.contender == PEER.name] == [1]
    assert listener.turns == benchmark.turns


def test_ctrl_c_keeps_what_there_is():
    report, log, *_ = run({("time", OURS.name, 4, 0): KeyboardInterrupt()}, shapes=("a", "b"))
    assert report.interrupted
    (shape,) = report.shapes
    assert [(r.contender, r.tokens) for r in shape.results] == [(OURS.name, 1), (PEER.name, 1)]
    assert log.count("close") == 2


def test_ctrl_c_before_anything_was_measured():
    report, log, *_ = run({("set up", OURS.name): KeyboardInterrupt()})
    assert report.interrupted and report.shapes[0].results == ()
    assert log.count("close") == 2


def test_every_shape_is_measured():
    report, _, listener, benchmark = run(shapes=("a", "b"), rounds=1)
    assert [s.name for s in report.shapes] == ["a", "b"]
    assert listener.turns == benchmark.turns == 8
    assert [len(r.shapes) for r in listener.saved] == [1, 2]


def test_notes_say_what_was_cut_and_what_is_cached():
    report, *_ = run()
    (note,) = report.shapes[0].notes
    assert note.startswith("weights may come from the cache") and OURS.name in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ()}, r"token counts are \[\]"),
        ({"tokens": (4, 0)}, r"token counts are \[4, 0\]"),
        ({"rounds": 0}, "rounds is 0"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    values = {"contenders": (OURS,), "tokens": (1,), "rounds": 1, "threads": 1, **change}
    with pytest.raises(ValueError, match=message):
        KernelsBenchmark(shapes={"a": SHAPE}, cut_experts=True, absent={}, **values)


def test_a_shape_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "usable_memory", lambda: 1 << 20)
    with pytest.raises(ValueError, match=r"GiB, of which 0\.0 may be used"):
        KernelsBenchmark({"a": SHAPE}, False, (contender("a"),), (1,), {}, 1)
