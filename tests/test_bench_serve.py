"""The client of `ktc bench serve` against a server whose schedule is known."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import urllib.request

import pytest
from helpers.fake_openai import running

from ktcompile.bench.serve import load, probe, run, servers
from ktcompile.bench.serve.arrivals import ClosedLoop, OpenLoop
from ktcompile.bench.serve.dialect import candidates
from ktcompile.bench.serve.lengths import Lengths
from ktcompile.bench.serve.outcome import OK
from ktcompile.bench.serve.run import Contender, ServeBenchmark
from ktcompile.bench.serve.sse import Events
from ktcompile.bench.serve.workload import Workload, random_requests

PLAIN = ["model", "prompt", "max_tokens", "temperature", "stream"]
TWO = ClosedLoop(2)


def workload(count=3, tokens=8, arrivals=TWO, inputs=5):
    return Workload(random_requests(count, Lengths(inputs), Lengths(tokens), arrivals, 0), arrivals, 0, "")


def find(url, w, api="completions", key=None, model=None, **others):
    return asyncio.run(probe.find(url, model, api, w, api_key=key, extra={}, timeout=20, **others))


def outcomes(url, w, api="completions", key=None, timeout=20.0):
    target = find(url, w, api, key)
    found = []
    asyncio.run(load.run(url, target.model, target.dialect, w, api_key=key, timeout=timeout, keep=found.append))
    return target, sorted(found, key=lambda o: o.index)


def seen(url):
    with urllib.request.urlopen(f"{url}/seen") as answer:
        return json.load(answer)


def test_times_are_those_of_the_schedule():
    with running(first=0.1, gap=0.02) as url:
        target, found = outcomes(url, workload())
        received = seen(url)
    assert target.dialect.ids and target.dialect.usage == "each" and target.max_model_len == 4096
    assert [o.status for o in found] == [OK] * 3 and {o.counting for o in found} == {"usage"}
    for o in found:
        own = next(s for s in received if s["body"]["prompt"] == workload().prompt(workload().requests[o.index]))
        assert o.prompt_tokens == 5 and [n for _, n in o.chunks] == [1] * 8 and o.finish == "length"
        # What was received cannot be earlier than it was sent.
        assert o.ttft >= own["times"][0] - own["received"] >= 0.1
        assert o.e2e >= own["times"][-1] - own["received"] >= 0.1 + 7 * 0.02
        assert o.end >= o.sent + o.e2e
        assert own["body"]["ignore_eos"] is True and own["body"]["max_tokens"] == 8 and own["body"]["stream"] is True


@pytest.mark.parametrize(
    ("behaviour", "counting", "counts"),
    [
        ({"chunk": 3}, "usage", [3, 3, 2]),
        # What a server holds back until it is text has tokens all the same.
        ({"silent": 1}, "usage", [1] * 8),
        ({"chunk": 3, "ids": True, "usage": "last"}, "token_ids", [3, 3, 2]),
        ({"chunk": 3, "usage": "last"}, "spread", [1, 3, 4]),
        ({"silent": 1, "usage": "last"}, "spread", [1, 2, 2, 3]),
        ({"chunk": 3, "usage": "never"}, "chunks", [1, 1, 1]),
        ({"usage": "last"}, "chunks", [1] * 8),
    ],
)
def test_tokens_of_chunks_are_counted(behaviour, counting, counts):
    with running(**behaviour) as url:
        _, found = outcomes(url, workload(count=1))
    assert found[0].status == OK and found[0].counting == counting
    assert [n for _, n in found[0].chunks] == counts


@pytest.mark.parametrize("refusal", [400, 422])
def test_a_server_that_understands_less_is_asked_for_less(refusal):
    with running(known=[*PLAIN, "stream_options"], refusal=refusal, texts=True) as url:
        target, found = outcomes(url, workload())
        body = seen(url)[-1]["body"]
    assert found[0].status == OK and not target.dialect.ids and target.dialect.full_length is None
    assert set(body) == {*PLAIN, "stream_options"} and len(body["prompt"].split()) == 5
    with running(known=[*PLAIN, "generation_config"], refusal=refusal, done=False) as url:
        target, found = outcomes(url, workload())
        body = seen(url)[-1]["body"]
    assert found[0].status == OK and json.loads(body["generation_config"])["min_new_tokens"] == 8
    with running(known=["model"]) as url, pytest.raises(ValueError, match="understands no request"):
        find(url, workload())


def test_chats_have_messages():
    with running(known=["messages", "ignore_eos", *PLAIN]) as url:
        target, found = outcomes(url, workload(), api="chat")
        body = seen(url)[-1]["body"]
    assert target.dialect.path == "/v1/chat/completions" and found[0].tokens == 8
    assert [m["role"] for m in body["messages"]] == ["user"] and "prompt" not in body


def test_the_richest_way_to_write_a_request_is_tried_first():
    ways = candidates("completions", True, {"top_p": 0.5})
    assert ways[0].ids and ways[0].usage == "each" and ways[0].full_length == "ignore_eos"
    assert json.loads(ways[0].body("m", [1], 2))["top_p"] == 0.5
    assert not any(way.ids for way in candidates("chat", True, {})) and len(set(map(str, ways))) == len(ways)


def test_an_open_loop_does_not_wait_for_answers():
    arrivals = OpenLoop(50.0)
    w = workload(count=10, tokens=2, arrivals=arrivals)
    with running(first=1.0) as url:
        _, found = outcomes(url, w)
    assert [o.status for o in found] == [OK] * 10
    assert [o.sent - o.late for o in found] == pytest.approx([r.arrival for r in w.requests], abs=1e-9)
    assert all(o.late >= 0 for o in found)
    assert max(o.sent for o in found) < min(o.end for o in found)


def test_a_closed_loop_has_so_many_at_a_time():
    with running(first=0.05) as url:
        _, found = outcomes(url, workload(count=7, tokens=1, arrivals=ClosedLoop(3)))
    for o in found:
        assert sum(other.sent <= o.sent < other.sent + other.e2e for other in found) <= 3
    assert len(found) == 7


@pytest.mark.parametrize(
    ("behaviour", "status", "words"),
    [
        ({"cut_after": 3}, "cut off", "without"),
        ({"error_after": 3}, "stream", "it broke"),
        ({"max_running": 0}, "429", "busy"),
        ({"first": 30.0}, "timeout", "no end after"),
        ({"die_after": 1}, "connection", ""),
    ],
)
def test_what_goes_wrong_is_an_outcome(behaviour, status, words):
    # The probe asks for two tokens: the first faults come later than that.
    w = workload(count=1)
    target = probe.Target("", "fake", candidates("completions", True, {})[0], None)
    found = []
    with running(**behaviour) as url:
        if behaviour == {"die_after": 1}:
            find(url, w)
        sending = load.run(url, "fake", target.dialect, w, api_key=None, timeout=1.0, keep=found.append)
        asyncio.run(sending)
    assert [o.status for o in found] == [status] and words in found[0].detail
    assert found[0].retry_after == (2.0 if status == "429" else None)


def test_errors_say_what_to_do():
    w = workload()
    with running(key="secret") as url:
        assert outcomes(url, w, key="secret")[1][0].status == OK
        for key in (None, "other"):
            with pytest.raises(ValueError, match=r"wants another key \(401\); --api-key"):
                find(url, w, key=key)
    with running(models=["a", "b"]) as url:
        assert find(url, w).model == "a" and find(url, w, model="b").model == "b"
        with pytest.raises(ValueError, match="has no model 'c'; it has a, b"):
            find(url, w, model="c")
        assert find(url, w, model="c", must_list=False).model == "c"
    with pytest.raises(ValueError, match=f"no server answers at {url}"):
        find(url, w)
    with pytest.raises(ValueError, match="is no address"):
        probe.base_url("localhost:8000")
    assert probe.base_url("http://a:1/v1/") == probe.base_url("http://a:1") == "http://a:1"


def test_events_that_are_cut_anywhere():
    stream = b': hello\r\n\r\nevent: x\ndata: {"a": 1}\n\ndata:b\ndata: c\r\n\r\n\ndata: [DONE]\n\n'
    wanted = [b'{"a": 1}', b"b\nc", b"[DONE]"]
    for cut in range(len(stream) + 1):
        events = Events()
        assert events.feed(stream[:cut]) + events.feed(stream[cut:]) == wanted
    events = Events()
    assert [e for i in range(len(stream)) for e in events.feed(stream[i : i + 1])] == wanted


def test_a_server_is_started_and_ended():
    run = (
        "import http.server, sys; "
        "H = type('H', (http.server.BaseHTTPRequestHandler,), "
        "{'do_GET': lambda s: (s.send_response(200), s.end_headers()), 'log_message': lambda *a: None}); "
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()"
    )
    port = servers.free_port()
    server = servers.Server([sys.executable, "-c", run, str(port)], {}, port)
    assert server.wait(30) > 0 and server.alive and server.resident_bytes() > 1 << 20
    server.close()
    assert not server.alive and server.resident_bytes() == 0
    server = servers.Server([sys.executable, "-c", "print('no model'); raise SystemExit(4)"], {}, port)
    with pytest.raises(servers.ServerError, match="ended with status 4: no model"):
        server.wait(30)
    server.close()
    server = servers.Server([sys.executable, "-c", "import time; time.sleep(60)"], {}, port)
    with pytest.raises(servers.ServerError, match="did not answer within"):
        server.wait(0.2)
    server.close()


class Impatient:
    """A listener that presses Ctrl-C after some requests."""

    def __init__(self, after):
        self.left, self.pressed = after, False

    def note(self, text):
        pass

    def save(self, report):
        pass

    def advance(self, turns):
        self.left -= turns
        if self.left < 0 and not self.pressed:  # several may have come at once
            self.pressed = True
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_keeps_what_was_measured():
    with running(first=0.02) as url:
        benchmark = ServeBenchmark(
            contenders=(Contender("a", url=url), Contender("b", url=url)),
            workload=workload(count=200),
            api="completions",
            warm_up=1,
            timeout=20.0,
            patience=20.0,
            threads=1,
            slo={},
            api_key=None,
            extra={},
        )
        report = run.run(benchmark, {}, Impatient(5), lambda contender, threads: pytest.fail("nothing is started"))
    assert report.interrupted and [r.name for r in report.runs] == ["a"]
    assert 4 <= len(report.runs[0].outcomes) < 200 and {o.status for o in report.runs[0].outcomes} == {OK}
