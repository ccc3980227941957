"""`ktc bench serve`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import fake_openai
from helpers.fake_openai import running

from ktcompile import cli
from ktcompile.bench.serve import servers
from ktcompile.bench.serve.report import ServeReport

BENCH = ["bench", "serve"]
SMALL = ["--requests", "6", "--concurrency", "3", "--output", "4", "--input", "9", "--warm-up", "1"]


def test_a_server_at_a_url(capsys, tmp_path):
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    files = ["--json", str(out), "--plot", str(png)]
    with running(first=0.01) as url:
        assert cli.main([*BENCH, "--url", f"{url}/v1", *SMALL, *files, "--slo", "ttft=0.001ms,itl=50s"]) == 0
    printed, err = capsys.readouterr()
    report = ServeReport.from_json(json.loads(out.read_text()))
    (run,) = report.runs
    summary = report.summary(run)
    assert (summary.statuses, summary.output_tokens, summary.input_tokens) == ({"ok": 6}, 24, 54)
    assert summary.met == 0 and summary.goodput == 0.0 and report.wanted == (4,) * 6
    assert run.model == "fake" and run.start_seconds is None and run.idle_bytes is None
    for word in ("closed loop of 3", "ttft", "itl", "tpot", "e2e", "goodput/s", "usage in each chunk"):
        assert word in printed
    assert f"wrote {out}" in err and png.read_bytes()[1:4] == b"PNG"
    png.unlink()
    assert cli.main([*BENCH, "--replot", str(out), "--plot", str(png)]) == 0 and png.exists()


def test_a_trace_is_replayed(capsys, tmp_path):
    file, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    lines = [
        {"timestamp": 1000 * i, "input_length": 520, "output_length": 16, "hash_ids": [0, i + 1]} for i in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    how = ["--trace", str(file), "--speed", "20", "--trace-scale", "0.125", "--requests", "3", "--json", str(out)]
    with running() as url:
        assert cli.main([*BENCH, "--url", url, *how]) == 0
    report = ServeReport.from_json(json.loads(out.read_text()))
    assert report.wanted == (2, 2, 2) and [o.prompt_tokens for o in report.runs[0].outcomes] == [65] * 3
    assert [round(o.sent - o.late, 2) for o in report.runs[0].outcomes] == [0.0, 0.05, 0.1]
    assert "trace at 20 times its speed" in capsys.readouterr().out


def test_failures_are_told_and_are_the_exit_status(capsys):
    with running(max_running=0) as url:
        assert cli.main([*BENCH, "--url", url, *SMALL]) == 2
        assert "does not answer as it should: 429" in capsys.readouterr().err
    with running(cut_after=3) as url:
        assert cli.main([*BENCH, "--url", url, *SMALL]) == 1
    printed = capsys.readouterr().out
    assert "ended by cut off: the stream ended without" in printed


@pytest.fixture
def fake_kinds(monkeypatch):
    """Let `kt` and `vllm` be fakes, the second one that does not start, and `transformers` not be installed."""

    def fake(model: Path, port: int) -> list[str]:
        code = f"import sys; sys.path.insert(0, {str(Path(fake_openai.__file__).parent)!r}); import fake_openai as f; "
        code += f"import asyncio; asyncio.run(f.serve(f.Behaviour(models=['other'], max_running=6, first=0.1), {port}))"
        return ["-c", code]

    def broken(model: Path, port: int) -> list[str]:
        return ["-c", "raise SystemExit('it has no model')"]

    kinds = {
        "kt": servers.Kind("sys", "fake", fake),
        "vllm": servers.Kind("sys", "broken", broken),
        "transformers": servers.Kind("no_such_package", "absent", broken),
    }
    monkeypatch.setattr(servers, "KINDS", kinds)


def test_servers_are_started_one_after_the_other(fake_kinds, capsys, tmp_path):
    out = tmp_path / "out.json"
    chosen = ["--servers", "kt", "vllm", "--peer-python", f"kt={sys.executable}", "--json", str(out)]
    assert cli.main([*BENCH, *chosen, *SMALL, "--patience", "60"]) == 0
    report = ServeReport.from_json(json.loads(out.read_text()))
    assert [r.name for r in report.runs] == ["kt"] and list(report.skipped) == ["vllm"]
    assert report.runs[0].start_seconds > 0 and report.runs[0].idle_bytes > 1 << 20
    assert report.runs[0].model == "other"
    assert "left out: vllm: it ended with status 1: it has no model" in capsys.readouterr().out


def test_a_soak(fake_kinds, capsys, tmp_path):
    out = tmp_path / "soak.json"
    assert cli.main([*BENCH, *SMALL, "--soak", "4", "--timeout", "5", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert "no problem was found" in printed and "p99 of ttft" in printed and "memory:" in printed
    assert set(record["statuses"]["bad JSON"]) <= {"400"} and set(record["statuses"]["oversize"]) <= {"400"}
    assert record["soaked"]["rate"] == pytest.approx(2 * record["capacity"])
    assert record["problems"] == [] and record["soaked"]["unended"] == 0 and record["soaked"]["idle"]["running"] == 0
    assert sum(sum(s.values()) for s in record["statuses"].values()) == len(record["soaked"]["ends"])


def test_a_soak_of_a_given_rate_measures_nothing_before(capsys, tmp_path):
    out = tmp_path / "soak.json"
    with running() as url:
        sent = ["--rate", "20", "--output", "4", "--input", "9", "--soak", "2"]
        assert cli.main([*BENCH, "--url", url, *sent, "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["capacity"] is None and record["soaked"]["rate"] == 20 and len(record["soaked"]["ends"]) == 40
    assert "capacity" not in capsys.readouterr().out


def test_a_soak_finds_what_is_wrong(capsys):
    with running(accept_bad=True, max_running=2, polite=False, first=0.02) as url:
        assert cli.main([*BENCH, "--url", url, *SMALL, "--concurrency", "2", "--soak", "2", "--timeout", "5"]) == 1
    printed = capsys.readouterr().out
    assert "had no Retry-After" in printed and "problem: " in printed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--url", "localhost:1"], "is no address"),
        (["--url", "http://127.0.0.1:9", "--servers", "kt"], "MODEL and --servers are for those that are started"),
        (["--url", "http://127.0.0.1:9", "--input", "many"], "'many' is no length"),
        (["--url", "http://127.0.0.1:9", "--rate", "0"], "a rate of 0.0 cannot be"),
        (["--url", "http://127.0.0.1:9", "--burstiness", "2"], "--burstiness is of --rate"),
        (["--url", "http://127.0.0.1:9", "--slo", "ttft=3"], "--slo has 'ttft=3'"),
        (["--url", "http://127.0.0.1:9", "--extra", "3"], "must be a JSON object"),
        (["--url", "http://127.0.0.1:9", "--extra", "{"], "--extra is no JSON"),
        (["--url", "http://127.0.0.1:9", "--requests", "0"], "--requests of 0"),
        (["--url", "http://127.0.0.1:9", "--warm-up", "-1"], "--warm-up of -1"),
        (["--url", "http://127.0.0.1:9", "--timeout", "0"], "--timeout of 0"),
        (["--url", "http://127.0.0.1:9", "--token-range", "5"], "--token-range '5'"),
        (["--url", "http://127.0.0.1:9", "--soak", "0"], "--soak of 0"),
        (["--url", "http://127.0.0.1:9", "--soak", "5", "--plot", "a.png"], "--soak takes one server"),
        (["--url", "http://127.0.0.1:9", "--trace", "none.jsonl"], "none.jsonl"),
        (["--servers", "kt", "sglang"], "server 'sglang' is unknown; there are kt, vllm, transformers"),
        (["--servers", "vllm", "--peer-python", "vllm"], "write NAME=PYTHON"),
        (["--servers", "vllm", "--peer-python", "vllm=/no/python"], "/no/python cannot be run"),
        (["--replot", "x.json"], "--replot needs --plot"),
    ],
)
def test_what_cannot_be_is_refused(options, problem, capsys):
    assert cli.main([*BENCH, *options]) == 2
    assert problem in capsys.readouterr().err


def test_nobody_there(capsys):
    port = servers.free_port()
    assert cli.main([*BENCH, "--url", f"http://127.0.0.1:{port}"]) == 2
    assert f"no server answers at http://127.0.0.1:{port}" in capsys.readouterr().err


def test_a_server_that_is_not_installed(fake_kinds, capsys):
    assert cli.main([*BENCH, "--servers", "transformers"]) == 2
    assert "transformers is not installed in" in capsys.readouterr().err
