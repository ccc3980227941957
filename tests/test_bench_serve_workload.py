"""What `ktc bench serve` sends, and when: lengths, arrivals, traces, prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ktcompile.bench.serve import lengths, trace, workload
from ktcompile.bench.serve.arrivals import ClosedLoop, OpenLoop, Replay
from ktcompile.bench.serve.lengths import Lengths
from ktcompile.bench.serve.workload import Workload, file_requests, random_requests, trace_requests

LINE = {"timestamp": 1500, "input_length": 600, "output_length": 7, "hash_ids": [4, 9]}
ONE = ClosedLoop(1)


def of(requests, arrivals=ONE, seed=0, **others):
    return Workload(requests, arrivals, seed, "", **others)


def test_lengths_have_the_mean_that_was_asked_for():
    drawn = Lengths(161, 1.2).draw(np.random.default_rng(0), 200_000)
    assert abs(np.mean(drawn) - 161) < 4 and min(drawn) >= 1
    assert abs(np.std(np.log(drawn)) - 1.2) < 0.02
    assert set(Lengths(128).draw(np.random.default_rng(0), 10)) == {128}
    assert max(Lengths(161, 1.2, most=200).draw(np.random.default_rng(0), 1000)) == 200


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "lognormal:", "lognormal:100", "lognormal:0,1", "lognormal:9,-1"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ValueError, match="is no length"):
        lengths.parse(text, lengths.SHAREGPT_PROMPT, 100)


def test_lengths_by_name():
    assert lengths.parse("7", lengths.SHAREGPT_PROMPT, 100) == Lengths(7, 0, 100)
    assert lengths.parse("sharegpt", lengths.SHAREGPT_ANSWER, 100) == Lengths(338, 0.9, 100)
    assert lengths.parse("lognormal:50,0.5", lengths.SHAREGPT_PROMPT, 9) == Lengths(50, 0.5, 9)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness(burstiness):
    times = OpenLoop(5.0, burstiness).times(np.random.default_rng(0), 100_000)
    gaps = np.diff([0.0, *times])
    assert (gaps >= 0).all() and abs(gaps.mean() - 0.2) < 0.005
    assert abs(gaps.std() / gaps.mean() - burstiness**-0.5) < 0.05


@pytest.mark.parametrize(
    "make", [lambda: ClosedLoop(0), lambda: OpenLoop(0.0), lambda: OpenLoop(1.0, -1.0), lambda: Replay(float("inf"))]
)
def test_arrivals_that_cannot_be(make):
    with pytest.raises(ValueError, match="cannot be"):
        make()


def test_one_seed_is_one_workload():
    def make(seed):
        arrivals = OpenLoop(2.0)
        w = of(random_requests(20, Lengths(50, 1.0), Lengths(9, 1.0), arrivals, seed), arrivals, seed)
        return w, [w.prompt(r) for r in w.requests]

    assert make(3) == make(3)
    (w, prompts), (_, others) = make(3), make(4)
    assert prompts != others and len({tuple(p) for p in prompts}) == 20
    assert [len(p) for p in prompts] == [r.input_tokens for r in w.requests]
    assert all(300 <= token < 4000 for p in prompts for token in p)
    # A prompt does not depend on how many there are beside it.
    assert w.prompt(w.requests[7]) == of(w.requests[7:8], seed=3).prompt(w.requests[7])
    assert len(w.text(w.requests[7]).split()) == w.requests[7].input_tokens


def test_blocks_with_one_id_are_the_same_tokens(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [LINE, {**LINE, "timestamp": 500, "input_length": 1100, "hash_ids": [4, 8, 9]}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    arrivals = Replay(2.0)
    requests, block = trace_requests(trace.read(file), arrivals)
    assert [(r.arrival, r.input_tokens, r.output_tokens) for r in requests] == [(0.0, 1100, 7), (0.5, 600, 7)]
    w = of(requests, arrivals, block=block)
    first, second = map(w.prompt, requests)
    assert first[:512] == second[:512] and first[512:600] != second[512:]
    assert (len(first), len(second)) == (1100, 600)
    assert second[512:] == first[1024:][:76] + second[588:]  # block 9, as far as both have it

    requests, block = trace_requests(trace.read(file), arrivals, scale=0.125)
    assert block == 64 and [(r.input_tokens, r.output_tokens) for r in requests] == [(128 + 10, 1), (64 + 11, 1)]
    w = of(requests, arrivals, block=block)
    assert [len(w.prompt(r)) for r in requests] == [138, 75]
    with pytest.raises(ValueError, match="cannot be scaled"):
        trace_requests(trace.read(file), arrivals, scale=2.0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ('{"timestamp": 1}', "input_length, output_length, hash_ids missing"),
        (json.dumps({**LINE, "timestamp": -1}), "timestamp is -1"),
        (json.dumps({**LINE, "timestamp": "soon"}), "timestamp is 'soon'"),
        (json.dumps({**LINE, "output_length": 0}), "output_length is 0"),
        (json.dumps({**LINE, "input_length": 1.5}), "input_length is 1.5"),
        (json.dumps({**LINE, "input_length": True}), "input_length is True"),
        (json.dumps({**LINE, "hash_ids": [1]}), "1 hash_ids; 600 tokens are 2 blocks"),
        (json.dumps({**LINE, "hash_ids": [1, "a"]}), "hash_ids must be"),
    ],
)
def test_a_line_of_a_trace_that_cannot_be_used_is_named(tmp_path, line, problem):
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps(LINE) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=problem) as caught:
        trace.read(file)
    assert f"{file}, line 3: " in str(caught.value)
    assert len(trace.read(file, limit=1)) == 1
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no requests"):
        trace.read(file)


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "max_tokens": 5}\n{"prompt": "two"}\n')
    requests = file_requests(file, 3, Lengths(9), ClosedLoop(1), 0)
    assert [(r.text, r.output_tokens) for r in requests] == [("one", 5), ("two", 9), ("one", 5)]
    assert of(requests).prompt(requests[1]) == of(requests).text(requests[1]) == "two"
    assert len(file_requests(file, None, Lengths(9), OpenLoop(1.0), 0)) == 2
    for line in ('{"prompt": 3}', '{"prompt": "a", "max_tokens": 0}', "x"):
        file.write_text('{"prompt": "one"}\n' + line)
        with pytest.raises(ValueError, match="line 2"):
            file_requests(file, None, Lengths(9), ClosedLoop(1), 0)


def test_token_ranges_that_have_no_tokens():
    requests = random_requests(1, Lengths(1), Lengths(1), ClosedLoop(1), 0)
    for tokens in ((5, 5), (-1, 4)):
        with pytest.raises(ValueError, match="the end excluded"):
            of(requests, tokens=tokens)
    assert workload.TOKEN_RANGE == (300, 4000)
