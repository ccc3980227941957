"""`ktc bench kernels`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from helpers.kernels_reports import report

from ktcompile import cli
from ktcompile.bench import kernels
from ktcompile.bench.report import KernelsReport
from ktcompile.bench.shapes import PRESETS
from ktcompile.machine import machine

BENCH = ["bench", "kernels"]


def test_quick_measures_prints_writes_and_draws(capsys, tmp_path):
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    files = ["--out", str(out), "--plot", str(png)]
    chosen = ["--formats", "bf16", "fp32", "--isas", "best", "scalar", "--tokens", "1", "4", "--threads", "1"]
    assert cli.main([*BENCH, "--quick", "--peers", "none", *chosen, *files]) == 0
    printed, err = capsys.readouterr()
    found = KernelsReport.from_json(json.loads(out.read_text()))
    (shape,) = found.shapes
    best = machine().isa
    names = [f"ktcompile-{f}/{isa}" for f in ("bf16", "fp32") for isa in dict.fromkeys((best, "scalar"))]
    assert [c.name for c in shape.contenders] == names
    assert [(r.tokens, r.contender) for r in shape.results] == [(t, n) for t in (1, 4) for n in names]
    assert all(r.rounds == 2 and r.fraction > 0 and 0 < r.of_best <= r.min_of_best for r in shape.results)
    assert all(0 < c.error < c.error_limit for c in shape.contenders)
    assert (shape.skipped, found.interrupted) == ({}, False)
    m = found.machine
    assert (m["isa"], m["threads"], m["cpu"]) == (best, 1, machine().cpu)
    assert {"ktcompile", "torch", "kt-kernel"} <= set(m["versions"]) and m["date"] and m["memory_bytes"]
    for word in ("tiny: 16 experts", "fraction", "of best", "GB/s", *names):
        assert word in printed
    assert "12 of 12" not in printed and f"wrote {out}" in err
    assert png.exists() and (tmp_path / "out-roofline.png").exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture
def measured(monkeypatch):
    """Make the benchmark return a report of the test's choice; return what was asked for."""
    asked = []

    def use(found):
        def run(benchmark, description, listener):
            asked.append(benchmark)
            listener.save(found)
            return found

        monkeypatch.setattr(kernels, "run", run)
        return asked

    return use


def test_json_goes_to_stdout_alone(capsys, measured):
    found = report("tiny", "odd-small")
    measured(found)
    assert cli.main([*BENCH, "--json", "--peers", "none"]) == 0
    out, _ = capsys.readouterr()
    assert KernelsReport.from_json(json.loads(out)) == found


def test_ctrl_c_reports_and_writes(capsys, measured, tmp_path):
    found = report(interrupted=True)
    measured(found)
    assert cli.main([*BENCH, "--peers", "none", "--out", str(tmp_path / "out.json")]) == 130
    out, _ = capsys.readouterr()
    assert "interrupted" in out and "ktcompile-bf16/scalar" in out
    assert "left out: kt-kernel-int4: not installed" in out and "note: a note" in out
    assert "2.00x" not in out and "1.00x" in out
    assert KernelsReport.from_json(json.loads((tmp_path / "out.json").read_text())) == found


def test_a_kernel_that_is_left_out_fails(measured):
    found = report()
    found.shapes[0].skipped["ktcompile-int8/scalar"] = "its result is wrong"
    measured(found)
    assert cli.main([*BENCH, "--peers", "none"]) == 1


def test_defaults_and_overrides(measured):
    asked = measured(report())
    assert cli.main([*BENCH, "--peers", "none", "--formats", "bf16"]) == 0
    assert cli.main([*BENCH, "--peers", "none", "--formats", "bf16", "--preset", "tiny", "--experts", "5"]) == 0
    custom = ["--hidden", "96", "--intermediate", "64", "--top-k", "2", "--experts", "4", "--rounds", "3"]
    assert cli.main([*BENCH, "--peers", "none", "--formats", "bf16", *custom]) == 0
    default, fewer, own = asked
    assert (list(default.shapes), default.cut_experts, default.rounds) == (["qwen3-30b-a3b"], True, 5)
    assert (fewer.shapes["tiny"].num_experts, fewer.shapes["tiny"].hidden_size, fewer.cut_experts) == (5, 256, False)
    assert [(s.num_experts, s.top_k, s.hidden_size, s.intermediate_size) for s in own.shapes.values()] == [
        (4, 2, 96, 64)
    ]
    assert (list(own.shapes), own.rounds) == (["custom"], 3)


def test_presets_are_listed(capsys):
    assert cli.main([*BENCH, "--preset", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)


def test_a_stored_result_is_drawn(capsys, tmp_path):
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(report("tiny", "odd-small").to_json()))
    assert cli.main([*BENCH, "--replot", str(stored), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").exists() and (tmp_path / "a-roofline.png").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpt-5"], "preset 'gpt-5' is unknown; there are tiny,"),
        (["--formats", "int3"], "'int3'"),
        (["--isas", "neon"], "ISA 'neon' is unknown"),
        (["--peers", "vllm"], "peer 'vllm' is unknown"),
        (["--tokens", "0"], "token counts are [0]"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "-2"], "--threads is -2"),
        (["--kt-kernel-threads", "0"], "--kt-kernel-threads is 0"),
        (["--experts", "4"], "top_k is 8, more than the 4 experts"),
        (["--experts", "9999", "--peers", "none"], "use fewer --experts"),
        (["--hidden", "-1"], "hidden_size is -1"),
        (["--preset", "tiny", "odd-small", "--hidden", "64"], "there are several"),
        (["--out", "/nowhere/out.json"], "/nowhere/out.json cannot be written"),
        (["--replot", "absent.json"], "--replot needs --plot"),
        (["--replot", "absent.json", "--plot", "a.png"], "absent.json"),
    ],
)
def test_bad_input_is_an_error_of_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*BENCH, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ktc: error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "other"}'])
def test_a_file_that_is_no_result_is_named(content, capsys, tmp_path):
    (tmp_path / "x.json").write_text(content)
    assert cli.main([*BENCH, "--replot", str(tmp_path / "x.json"), "--plot", str(tmp_path / "a.png")]) == 2
    assert f"{tmp_path / 'x.json'} cannot be drawn" in capsys.readouterr().err
