"""`ktc simulate`: what it prints, where, and how it refuses."""

from __future__ import annotations

import json

import pytest

from ktcompile import cli
from ktcompile.bench.models import MODELS, model_facts
from ktcompile.plan.simulate import STRATEGIES
from ktcompile.plan.synthetic import Traffic, generate

TINY = ["--model-shape", "tiny", "--requests", "2"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    generate(Traffic("drift", 4, 16, 4, requests=2, prompt=40, answer=30), 0).save(path)
    return path


def test_tables_say_that_they_are_simulated(capsys):
    assert cli.main(["simulate", "--synthetic", "topics", *TINY, "--fractions", "0", "50", "100"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("simulated: tiny on 4090-ddr5, synthetic topics")
    assert out.count("simulated") == 4
    assert "kt-dynamic" in out and "clairvoyant" in out
    assert "simulating: 100 %" in err


def test_json_files_and_plots(trace, tmp_path, capsys):
    out, plot, profile = tmp_path / "out.json", tmp_path / "plot.png", tmp_path / "profile.json"
    generate(Traffic("drift", 4, 16, 4, requests=2, prompt=40, answer=30), 1).profile().save(profile)
    command = ["simulate", "--trace", str(trace), "--profile", str(profile), "--model-shape", "tiny", "--json"]
    assert cli.main([*command, "--fractions", "25", "75", "--out", str(out), "--plot", str(plot)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert report["simulated"] is True and report["generated_tokens"] > 0
    assert {r["fraction"] for r in report["results"]} == {0.25, 0.75}
    assert {r["strategy"] for r in report["results"]} >= {"frequency", "adaptive", "kt-dynamic"}
    assert all(r["tokens_per_second"] > 0 for r in report["results"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_hits_is_drawn_too(trace, tmp_path):
    plot = tmp_path / "plot.png"
    command = ["simulate", "--trace", str(trace), "--model-shape", "tiny", "--fractions", "0", "--plot", str(plot)]
    assert cli.main(command) == 0
    assert plot.exists()


def test_a_seed_is_no_wait(capsys):
    command = ["simulate", "--synthetic", "drift", *TINY, "--fractions", "50", "--seed", "7", "--json"]
    assert cli.main([*command, "--strategies", "uniform", "kt-uniform"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["results"]
    assert theirs["decode_seconds"] == pytest.approx(ours["decode_seconds"], rel=0.1)


def test_lists(capsys):
    assert cli.main(["simulate", "--synthetic", "drift", "--model-shape", "list"]) == 0
    assert cli.main(["simulate", "--synthetic", "drift", "--strategies", "list"]) == 0
    assert capsys.readouterr().out.split() == [*MODELS, *STRATEGIES]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--synthetic", "waves"], "'waves' is unknown; there are stationary"),
        (["--synthetic", "drift", "--hardware", "4091"], "presets are 4090-ddr5"),
        (["--synthetic", "drift", "--model-shape", "big"], "'big' is unknown; there are tiny"),
        (["--synthetic", "drift", "--strategies", "best"], "'best' is unknown; there are uniform"),
        (["--synthetic", "drift", "--fractions", "101"], "101; it must be from 0 to 100"),
        (["--synthetic", "drift", "--requests", "0"], "--requests is 0"),
        (["--synthetic", "drift", "--seed", "-1"], "--seed is -1"),
        (["--synthetic", "drift", "--interval", "0"], "decode steps, at least 1"),
        (["--synthetic", "drift", "--weight-bytes", "0"], "cannot take 0"),
        (["--synthetic", "drift", "--out", "/nowhere/x.json"], "cannot be written"),
        (["--trace", "none.npz"], "none.npz"),
        (["--trace", __file__], "is not a routing trace"),
    ],
)
def test_mistakes_are_one_line(arguments, what, capsys, trace):
    extra = [] if "--model-shape" in arguments else ["--model-shape", "tiny"]
    assert cli.main(["simulate", *arguments, *extra]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("ktc: error: ") and what in err
    assert "Traceback" not in err


def test_frequency_needs_a_profile_beside_a_trace(trace, capsys):
    command = ["simulate", "--trace", str(trace), "--model-shape", "tiny", "--fractions", "50"]
    assert cli.main([*command, "--strategies", "frequency"]) == 2
    assert "needs --profile" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "frequency" not in capsys.readouterr().out
    assert cli.main(["simulate", "--trace", str(trace), "--fractions", "50"]) == 2
    assert "the model has (48, 128)" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_models_have_about_as_many_weights_as_published(name):
    published = {"qwen3-30b-a3b": 30.5e9, "deepseek-v3": 671e9, "kimi-k2": 1026e9, "mixtral-8x7b": 46.7e9}
    facts = model_facts(name)
    if name in published:
        assert facts.expert_bytes + facts.dense_bytes == pytest.approx(published[name], rel=0.02)
    assert model_facts(name, 0.5).expert_bytes * 2 == facts.expert_bytes
