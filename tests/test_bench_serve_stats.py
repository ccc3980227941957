"""What follows from outcomes: gaps between tokens, percentiles, goodput, soaks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.bench.serve import gauges, slo
from ktcompile.bench.serve.gauges import Gauges
from ktcompile.bench.serve.outcome import OK, Outcome, spread
from ktcompile.bench.serve.report import ServeReport, ServerRun
from ktcompile.bench.serve.soak import Soaked, SoakEnd
from ktcompile.bench.serve.soak_report import SoakReport
from ktcompile.bench.serve.stats import Spread, summarise

TIMES = st.floats(0.0, 1e3)


@st.composite
def outcomes(draw, index=0):
    status = draw(st.sampled_from([OK, OK, OK, "429", "timeout"]))
    times = sorted(draw(st.lists(TIMES, min_size=1, max_size=12)))
    chunks = tuple((t, draw(st.integers(1, 5))) for t in times)
    sent = draw(TIMES)
    return Outcome(index, sent, 0.0, sent + times[-1] + 0.1, status, 5, chunks if status == OK else ())


@given(outcomes())
def test_gaps_are_those_between_tokens_and_add_up(o):
    if o.status != OK:
        return
    gaps = o.gaps()
    assert len(gaps) == o.tokens - 1 and min(gaps, default=0.0) >= 0
    assert sum(gaps) == pytest.approx(o.e2e - o.ttft, abs=1e-6)
    if o.tokens > 1:
        assert np.mean(gaps) == pytest.approx(o.tpot, abs=1e-9)


@given(st.integers(0, 500), st.integers(0, 60))
def test_tokens_are_spread_evenly_over_chunks(tokens, chunks):
    counts = spread(tokens, chunks)
    assert len(counts) == chunks and (not chunks or sum(counts) == max(tokens, chunks))
    assert min(counts, default=1) >= 1
    if chunks > 1:
        assert counts[0] == 1 and max(counts[1:]) - min(counts[1:]) <= 1


@given(st.lists(TIMES, min_size=1))
def test_percentiles(values):
    s = Spread.of(values)
    assert s is not None and s.count == len(values)
    tolerance = 1e-9 * max(values) + 1e-12
    assert min(values) - tolerance <= s.p50 <= s.p90 + tolerance <= s.p99 + 2 * tolerance <= max(values) + 3 * tolerance
    assert s.max == max(values) and min(values) - tolerance <= s.mean <= max(values) + tolerance
    assert sum(v <= s.p90 + tolerance for v in values) >= 0.9 * (len(values) - 1)
    assert s == Spread.of(values[::-1]) or s.mean == pytest.approx(Spread.of(values[::-1]).mean)
    assert Spread.of([]) is None


@given(
    st.lists(outcomes(), max_size=8).map(
        lambda found: [Outcome(**{**fields(o), "index": i}) for i, o in enumerate(found)]
    )
)
def test_a_summary_counts_everything_once(found):
    wanted = {o.index: 10 for o in found}
    s = summarise(found, wanted, {"ttft": 1.0, "itl": 0.5})
    good = [o for o in found if o.status == OK]
    assert sum(s.statuses.values()) == len(found)
    assert s.output_tokens == sum(o.tokens for o in good) and s.input_tokens == 5 * len(good)
    assert s.met is not None and s.met <= len(good) and s.short == sum(o.tokens < 10 for o in good)
    assert s.goodput is not None and s.goodput <= s.request_rate + 1e-12
    assert (s.ttft.count if s.ttft else 0) == len(good)
    assert (s.itl.count if s.itl else 0) == s.output_tokens - len(good)
    assert all(o.sent + s.seconds >= 0 for o in found)
    # Stricter objectives are met by no more requests, none at all by those that ended well.
    assert summarise(found, wanted, {"ttft": 0.5, "itl": 0.1}).met <= s.met
    assert summarise(found, wanted, {"e2e": 1e9}).met == len(good)
    assert summarise(found, wanted, {}).goodput is None


def fields(o):
    return {name: getattr(o, name) for name in Outcome.__dataclass_fields__}


def test_rates_by_hand():
    found = [
        Outcome(0, 1.0, 0.0, 3.0, OK, 10, ((0.5, 1), (1.0, 1), (2.0, 2))),
        Outcome(1, 2.0, 0.0, 6.0, OK, 20, ((3.0, 1), (4.0, 1))),
        Outcome(2, 2.5, 0.0, 2.6, "429"),
    ]
    s = summarise(found, {0: 4, 1: 3, 2: 3}, {"ttft": 1.0})
    assert (s.seconds, s.output_tokens, s.output_rate, s.request_rate) == (5.0, 6, 1.2, 0.4)
    assert (s.goodput, s.met, s.short) == (0.2, 1, 1)
    assert found[0].gaps() == [0.5, 0.5, 0.5] and s.ttft.p50 == 1.75 and s.e2e.max == 4.0
    assert s.statuses == {"429": 1, OK: 2}


def test_objectives():
    assert slo.parse("ttft=500ms, itl=0.08s") == {"ttft": 0.5, "itl": 0.08}
    for text in ("", "ttft=5", "ttft=5m", "latency=5ms", "ttft", "ttft=1s,,"):
        with pytest.raises(ValueError, match="--slo has"):
            slo.parse(text)
    slow_once = Outcome(0, 0, 0, 9, OK, 1, tuple((t, 1) for t in [0.1 * i for i in range(50)] + [8.0]))
    assert slo.met(slow_once, {"ttft": 0.1, "tpot": 0.2}) and not slo.met(slow_once, {"itl": 0.2})
    one_token = Outcome(0, 0, 0, 1, OK, 1, ((0.1, 1),))
    assert slo.met(one_token, {"itl": 0.001, "tpot": 0.001}) and not slo.met(one_token, {"e2e": 0.05})


def test_a_report_survives_its_file():
    run = ServerRun("a", "http://a", "m", "d", 1.5, 10, 20, (Outcome(0, 0.25, 0.0, 1.0, OK, 3, ((0.5, 1), (0.75, 2))),))
    report = ServeReport({"cpu": "x"}, {"requests": 1}, False, (3,), {"ttft": 1.0}, (run,), {"b": "why"})
    record = json.loads(json.dumps(report.to_json()))
    assert ServeReport.from_json(record) == report
    assert record["runs"][0]["summary"]["output_tokens"] == 3 and run.counting == "chunks"
    for broken in ({}, [], {**record, "schema": "other"}, {**record, "runs": [{}]}, {**record, "more": 1}):
        with pytest.raises(ValueError, match=r"it is not a result|missing or unknown"):
            ServeReport.from_json(broken)


def soaked(ordinary=(), ends=(), **others):
    ends = (*ends, *(SoakEnd("ordinary", o.sent, o.status) for o in ordinary))
    values = {"unended": 0, "memory": (), "idle": None, "answers_after": True, **others}
    return SoakReport({}, {}, "a", "m", "d", 1.0, Soaked(2.0, 9.0, tuple(ordinary), tuple(ends), **values))


def good(sent, gap):
    return Outcome(0, sent, 0, sent + 1, OK, 1, ((0.1, 1), (0.1 + gap, 1)))


def test_a_soak_compares_its_first_third_with_its_last():
    memory = tuple((float(t), 100 + 10 * t) for t in range(12))
    report = soaked([good(0.5, 0.1), good(4.0, 9.0), good(8.0, 0.3)], memory=memory)
    assert report.thirds()["itl"].drift == pytest.approx(3.0) and report.thirds()["ttft"].drift == pytest.approx(1.0)
    assert report.memory() == (110, 180, 190) and report.problems() == []
    assert soaked([good(0.5, 0.1)]).thirds() == {} and soaked().memory() is None
    assert json.loads(json.dumps(report.to_json()))["p99_seconds"]["itl"]["drift"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (soaked(unended=2), "2 requests were stuck"),
        (soaked(ends=[SoakEnd("bad JSON", 0, "500")]), "1 requests (bad JSON) ended by: 500"),
        (soaked(ends=[SoakEnd("bad JSON", 0, OK)]), "1 requests that are none were answered"),
        (soaked([Outcome(0, 0, 0, 1, "timeout")]), "1 requests (ordinary) ended by: timeout"),
        (soaked(ends=[SoakEnd("leaves", 0, "connection")]), "1 requests (leaves) ended by: connection"),
        (soaked([Outcome(0, 0, 0, 1, "429", retry_after=1.0), Outcome(1, 0, 0, 1, "429")]), "1 of 2 refusals had no"),
        (soaked(answers_after=False), "it did not answer"),
        (soaked(idle=Gauges(1.0, 0.0, 0.0)), "its running was 1"),
    ],
)
def test_what_a_server_must_not_do_is_a_problem(report, problem):
    assert [p for p in report.problems() if problem in p] == report.problems() != []


def test_what_a_full_server_may_do_is_none():
    ends = [SoakEnd("slow", 0, "503"), SoakEnd("oversize", 0, "413"), SoakEnd("leaves", 0, "left")]
    assert soaked([Outcome(0, 0, 0, 1, "429", retry_after=3.0)], ends, idle=Gauges(0.0, None, 0.0)).problems() == []


def test_gauges_by_any_prefix():
    text = '# HELP x y\nvllm:num_requests_running{model_name="a b"} 2.0\nvllm:num_requests_waiting 1\nother 7\n'
    assert gauges.parse(text) == Gauges(2.0, 1.0, None)
    assert gauges.parse("ktcompile_kv_cache_usage_perc 2.5e-1\nktcompile:num_requests_waiting 0\n") == Gauges(
        None, 0, 0.25
    )
