"""`ktc bench model`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from helpers.fake_vllm import FAKE_VLLM
from helpers.model_reports import report

from ktcompile import cli
from ktcompile.bench.model import run as model_run
from ktcompile.bench.model.report import ModelReport

BENCH = ["bench", "model"]


def test_the_small_model_is_measured_beside_one_that_crashes(capsys, tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("import os; os.abort()")
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = tmp_path / "a.gguf"
    file.touch()
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    chosen = ["--contenders", "kt-eager", "llama.cpp", "vllm", "--threads", "1"]
    sizes = ["--batches", "2", "--prompts", "16", "--rounds", "2", "--steps", "2", "--gguf", f"bf16={file}"]
    assert cli.main([*BENCH, *chosen, *sizes, "--json", str(out), "--plot", str(png)]) == 0
    printed, err = capsys.readouterr()
    found = ModelReport.from_json(json.loads(out.read_text()))
    assert [c.name for c in found.contenders] == ["kt-eager", "vllm"]
    assert found.skipped == {"llama.cpp:bf16": "its process was ended by SIGABRT"}
    assert [(t.contender, str(t.work), t.round) for t in found.turns] == [
        *(("kt-eager", "decode 2", 0), ("vllm", "decode 2", 0)),
        *(("kt-eager", "prefill 16", 0), ("vllm", "prefill 16", 0)),
        *(("vllm", "decode 2", 1), ("kt-eager", "decode 2", 1)),
        *(("vllm", "prefill 16", 1), ("kt-eager", "prefill 16", 1)),
    ]
    assert 0 <= found.agreement["vllm"] <= 1
    assert all(r.fraction > 0 and r.seconds >= r.min_seconds > 0 for r in found.results)
    assert found.results[0].ratios.keys() == {"vllm"}
    start = found.starts["kt-eager"]
    assert start.load_seconds > 0 and start.peak_bytes >= start.resident_bytes > 10**8
    assert start.first_seconds.keys() == {"decode 2", "prefill 16"} and "torch" in start.versions
    for word in (
        "decode 2",
        "prefill 16",
        "kt-eager is",
        "faster by",
        "same tokens",
        "left out: llama.cpp:bf16: its process",
    ):
        assert word in printed
    assert f"wrote {out}" in err and png.exists() and not list(tmp_path.glob("*.part"))


@pytest.fixture
def measured(monkeypatch):
    """Make the benchmark return a report of the test's choice; return what was asked for."""
    asked = []

    def use(found):
        def run(benchmark, description, listener):
            asked.append(benchmark)
            listener.save(found)
            return found

        monkeypatch.setattr(model_run, "run", run)
        return asked

    return use


def test_defaults_and_overrides(measured, tmp_path):
    asked = measured(report())
    (tmp_path / "q8_0.gguf").touch()
    assert cli.main(BENCH) == 0
    files = ["--gguf", f"q8_0={tmp_path / 'q8_0.gguf'}", "--gguf-folder", str(tmp_path)]
    numbers = ["--rounds", "2", "--steps", "3", "--threads", "1", "--once-above", "9", "--patience", "8"]
    assert cli.main([*BENCH, "--batches", "2", "2", "--prompts", "--cache", "static", *numbers, *files]) == 0
    default, own = asked
    assert [c.name for c in default.contenders] == ["kt", "transformers"]
    assert [str(w) for w in default.settings.works] == [
        *("decode 1", "decode 4", "decode 8", "decode 16"),
        *("prefill 512", "prefill 2048", "prefill 8192"),
    ]
    assert (default.rounds, default.settings.steps, default.settings.cache) == (3, 16, "dynamic")
    assert default.settings.gguf_folder.parent.name == "gguf" and default.model.vocab_size == 4096
    assert [str(w) for w in own.settings.works] == ["decode 2"]
    s = own.settings
    assert (own.rounds, s.steps, s.threads, own.once_above, s.patience, s.cache) == (2, 3, 1, 9, 8, "static")
    assert s.gguf_folder == tmp_path and s.gguf_files == {"q8_0": tmp_path / "q8_0.gguf"}


def test_ctrl_c_reports_and_writes(capsys, measured, tmp_path):
    found = report(interrupted=True)
    measured(found)
    assert cli.main([*BENCH, "--json", str(tmp_path / "out.json")]) == 130
    out, _ = capsys.readouterr()
    assert "interrupted" in out and "left out: zentorch: not installed" in out and "2.00x" in out and "0.75" in out
    assert ModelReport.from_json(json.loads((tmp_path / "out.json").read_text())) == found


def test_ktcompile_left_out_fails(measured):
    found = report()
    found.skipped["kt:int4"] = "decode 4: wrong"
    measured(found)
    assert cli.main(BENCH) == 1


def test_a_stored_result_is_drawn(capsys, tmp_path):
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(report().to_json()))
    assert cli.main([*BENCH, "--replot", str(stored), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").exists() and capsys.readouterr().out == ""


def test_help_names_every_contender(capsys):
    with pytest.raises(SystemExit):
        cli.main([*BENCH, "--help"])
    out = capsys.readouterr().out
    from ktcompile.bench.model.contenders import KINDS

    assert all(f"\n  {kind}" in out for kind in KINDS) and "examples:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/model"], "/nowhere/model"),
        (["--contenders", "gpt"], "contender 'gpt' is unknown; there are all, kt,"),
        (["--contenders", "zentorch"], "contender 'zentorch' is not installed in"),
        (["--peer-python", "vllm"], "--peer-python 'vllm' is none; write NAME=PYTHON"),
        (["--peer-python", "lama=python"], "--peer-python names 'lama'"),
        (["--gguf", "bf16=/nowhere.gguf"], "--gguf bf16=/nowhere.gguf: there is no such format, or no such file"),
        (["--batches", "0"], "batches and prompts of 0"),
        (["--batches", "--prompts"], "nothing to measure"),
        (["--rounds", "0"], "--rounds of 0"),
        (["--steps", "-1"], "--steps of -1"),
        (["--threads", "0"], "--threads of 0"),
        (["--json", "/nowhere/out.json"], "/nowhere/out.json cannot be written"),
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
