"""`ktc generate` with experts on a device, and what it records."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.text_model import save_model

from ktcompile import cli
from ktcompile.cli import device_args
from ktcompile.config import DeviceOptions
from ktcompile.engine.generate import CachedModel
from ktcompile.models import load as loading
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.trace import Trace

KTC = Path(sys.executable).with_name("ktc")
PROMPT = "def fibonacci(n):"
HALF = ("--device", "stand-in", "--placement", "uniform", "--stream-from", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def restored(threads):
    """Undo what commands do to the process."""
    yield
    torch._dynamo.reset()


def run_generate(model, *others):
    arguments = ["generate", PROMPT, "--model", str(model), "--threads", "1", "--max-tokens", "8", *map(str, others)]
    return cli.main(arguments)


def generated(capsys, model, *others):
    assert run_generate(model, "--json", "--quiet", *others) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def error_line(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ktc: error: ") and err.count("\n") == 1
    return err


def test_the_embedded_model_on_two_sides_writes_what_the_cpu_writes(capsys):
    command = ["generate", PROMPT, "--max-tokens", "24", "--json", "--quiet"]
    texts = []
    for others in ((), HALF, ("--device", "stand-in", "--stream-from", "4", "--replan", "interval=4,horizon=4096")):
        assert cli.main([*command, *others]) == 0
        found = json.loads(capsys.readouterr().out)
        texts.append(found["text"])
        assert (found["experts"] is None) == (not others)
    assert texts[0] and len(set(texts)) == 1
    assert found["experts"]["hit_rate"] > 0


def test_json_has_what_the_experts_did(model, capsys):
    found = generated(capsys, model, *HALF, "--device-expert-fraction", "0.4")
    assert found["device"] == "stand-in"
    experts = found["experts"]
    assert [layer["resident"] for layer in experts["layers"]] == [[0, 1], [0, 1]]
    assert all(layer["calls"] == 8 for layer in experts["layers"])
    size = sum(layer["bytes_promoted"] for layer in experts["layers"])
    # What does not fit stays with the CPU; a size may have a unit.
    less = generated(capsys, model, *HALF, "--device-expert-fraction", "0.4", "--device-memory", f"{size / 2e3}K")
    assert sum(len(layer["resident"]) for layer in less["experts"]["layers"]) == 2
    kept = generated(capsys, model, *HALF, "--device-expert-fraction", "0.4", "--keep-cpu-copy")
    assert kept["text"] == found["text"]
    alone = generated(capsys, model)
    assert (alone["device"], alone["experts"], alone["text"]) == ("none", None, found["text"])


def test_people_are_told_in_a_line(model, capsys):
    assert run_generate(model, *HALF) == 0
    err = capsys.readouterr().err
    assert "of 10 on the stand-in device | " in err and "swaps" in err and err.count("\n") == 2


def test_the_compiler_is_given_the_options(tmp_path, capsys, monkeypatch):
    compiler = torch.compile

    def without_inductor(function, *, backend, options):
        return compiler(function, backend=backend, options={**options, "inner": "program"})

    monkeypatch.setattr(torch, "compile", without_inductor)
    model, trace = save_model(tmp_path, layers=1), tmp_path / "trace.npz"
    capsys.readouterr()
    expected = generated(capsys, model)["text"]
    others = ("--compile", "--max-tokens", "1", "--device-expert-fraction", "0.4", "--record-routing", trace)
    assert run_generate(model, "--json", "--quiet", *HALF, *others) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compiled"] and expected.startswith(found["text"])
    assert [layer["resident"] for layer in found["experts"]["layers"]] == [[0, 1]]
    assert Trace.load(trace).num_steps == 1


@pytest.mark.parametrize("others", [(), HALF])
def test_what_was_recorded_is_replayed(others, tmp_path, capsys):
    trace, profile = tmp_path / "trace.npz", tmp_path / "profile.npz"
    command = ["generate", "import os, sys, time\n" * 4, "--max-tokens", "12", "--quiet", *others]
    assert cli.main([*command, "--record-routing", str(trace), "--routing-profile", str(profile)]) == 0
    recorded = Trace.load(trace)
    assert (recorded.num_layers, recorded.num_experts, recorded.num_steps) == (4, 16, 12)
    assert recorded.prefill.tolist() == [True, *[False] * 11]
    assert (recorded.counts(1, 12).sum(2) == 4).all()  # of each token, in each layer
    capsys.readouterr()
    command = ["simulate", "--trace", str(trace), "--profile", str(profile), "--model-shape", "tiny", "--json"]
    assert cli.main([*command, "--fractions", "25"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompt_tokens"], report["generated_tokens"]) == (recorded.tokens[0], 11)
    assert all(r["tokens_per_second"] > 0 for r in report["results"])


def test_a_profile_is_added_to_and_used(model, tmp_path, capsys):
    profile = tmp_path / "profile.json"
    for run in (1, 2):
        generated(capsys, model, *HALF, "--routing-profile", profile)
        counted = RoutingProfile.load(profile)
        tokens = sum(counted.tokens(phase) for phase in Phase)
        assert tokens == pytest.approx(run * (5 + 7), rel=1e-3)
    used = generated(capsys, model, "--device", "stand-in", "--placement", "counts", "--routing-profile", profile)
    most = (counted.rows(Phase.DECODE) + counted.rows(Phase.PREFILL))[0].argmax()
    assert most in used["experts"]["layers"][0]["resident"]


def test_reports_of_experts(model, tmp_path, capsys):
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    found = generated(capsys, model, *HALF, "--experts-report", report, "--experts-plot", plot)
    assert json.loads(report.read_text()) == found["experts"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run_generate(model, *HALF, "--experts-report", report) == 0
    assert capsys.readouterr().err.endswith(f"wrote {report}\n")


def test_every_field_of_the_record_is_an_option():
    parser = cli.argparse.ArgumentParser()
    device_args.add_device_arguments(parser)
    assert device_args.device_options(parser.parse_args([])) == DeviceOptions()
    given = ["--device", "stand-in", "--device-memory", "512M", "--keep-cpu-copy", "--replan", "interval=8,margin=0.5"]
    made = device_args.device_options(
        parser.parse_args([*given, "--device-expert-fraction", "1", "--stream-from", "9"])
    )
    assert made == DeviceOptions(
        device="stand-in",
        device_memory=512 * 10**6,
        keep_cpu_copy=True,
        replan=(("interval", 8), ("margin", 0.5)),
        device_expert_fraction=1.0,
        stream_from=9,
    )


def test_a_threshold_that_is_none(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "x", "--replan", "often"])
    assert "'often' is no threshold; write it as interval=128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (("--device-expert-fraction", "2"), "device_expert_fraction is 2.0"),
        (("--replan", "pause=3"), "replan has 'pause', which is unknown"),
        (("--placement", "counts"), "needs a routing_profile"),
        (("--device", "stand-in", "--placement", "counts", "--routing-profile", "none.npz"), "none.npz"),
        (("--record-routing", "/nowhere/trace.npz"), "/nowhere/trace.npz cannot be written"),
        (("--routing-profile", "/nowhere/profile.npz"), "/nowhere/profile.npz cannot be written"),
        (("--experts-report", "report.json"), "--experts-report is about experts on a device; name one with --device"),
        ((*HALF, "--experts-plot", "/nowhere/plot.png"), "/nowhere/plot.png cannot be written"),
        ((*HALF, "--experts-report", "/"), "/ cannot be written: it is a directory"),
    ],
)
@pytest.mark.parametrize("how", ["--no-compile", "--compile"])
def test_mistakes_are_found_before_the_model_is_loaded(how, others, words, model, capsys, monkeypatch):
    monkeypatch.setattr(loading, "_read", lambda *_: pytest.fail("the model was loaded"))
    assert run_generate(model, how, *others) == 2
    assert words in error_line(capsys)


def test_a_profile_of_another_model_is_refused_before_the_first_token(model, tmp_path, capsys):
    RoutingProfile(3, 5).save(tmp_path / "profile.npz")
    for others in ((), HALF):
        assert run_generate(model, "--routing-profile", tmp_path / "profile.npz", *others) == 2
        assert "(3, 5) layers and experts; the model has (2, 5)" in error_line(capsys)


def test_a_full_disk_costs_the_file_and_not_the_text(model, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    trace = tmp_path / "trace.npz"
    assert run_generate(model, "--quiet", "--record-routing", trace) == 2
    out, err = capsys.readouterr()
    assert out.startswith(PROMPT) and len(out) > len(PROMPT) + 1
    assert f"{trace} cannot be written: No space left on device" in err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def interruptible():
    """SIGINT interrupts, even where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("others", [(), HALF])
def test_ctrl_c_keeps_profile_and_trace(others, model, tmp_path, capsys, monkeypatch):
    steps, logits = [], CachedModel.__call__

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return logits(*arguments)

    monkeypatch.setattr(CachedModel, "__call__", interrupted)
    trace, profile = tmp_path / "trace.npz", tmp_path / "profile.npz"
    assert run_generate(model, "--record-routing", trace, "--routing-profile", profile, *others) == 130
    assert f"wrote {trace}\nwrote {profile}\n" in capsys.readouterr().err
    assert Trace.load(trace).num_steps == 3
    assert RoutingProfile.load(profile).steps(Phase.DECODE) == pytest.approx(3, rel=1e-3)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_the_first_token_writes_nothing(model, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(CachedModel, "__call__", interrupted)
    assert run_generate(model, "--quiet", "--record-routing", tmp_path / "trace.npz", *HALF) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_a_process_that_is_interrupted_keeps_the_trace(tmp_path):
    """At whatever moment the signal comes."""
    trace = tmp_path / "trace.npz"
    command = [KTC, "generate", PROMPT, "--max-tokens", "100000", "--record-routing", trace, *HALF]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(len(PROMPT) + 20)  # the first tokens are there
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert Trace.load(trace).num_steps > 1
