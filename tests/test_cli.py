"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.text_model import byte_level_tokenizer, save_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import ktcompile
from ktcompile import cli
from ktcompile.engine import generate as engine
from ktcompile.machine import machine
from ktcompile.models import tiny_model
from ktcompile.ops import reference
from ktcompile.quant import FORMATS
from ktcompile.runtime import self_check
from ktcompile.runtime.cuda_support import why_not

KTC = Path(sys.executable).with_name("ktc")
PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def restored(threads):
    """Undo what commands do to the process, and forget the machine that a test pretended to have."""
    yield
    machine.cache_clear()


@pytest.fixture
def own_model(model, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def run_generate(model, *others):
    return cli.main(["generate", PROMPT, "--model", str(model), "--threads", "1", "--max-tokens", "8", *others])


def one_error_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ktc: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("command", [[], ["doctor"], ["generate"], ["plan"], ["bench", "kernels"], ["simulate"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"ktc {' '.join(command)}".strip() in out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ktcompile {ktcompile.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate"], ["generate", "x", "--weight-format", "int3"]])
def test_a_malformed_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: ktc" in capsys.readouterr().err


def test_doctor_describes_the_machine_and_passes(capsys):
    assert cli.main(["doctor", "--json", "--quick"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["ok"] and report["problems"] == [] and err == ""
    assert report["machine"]["isas"] == list(machine().isas)
    assert report["machine"]["isa"] == machine().isa
    expected = os.environ.get("KTCOMPILE_EXPECT_ISAS", "scalar").split(",")
    assert set(expected) <= set(report["machine"]["isas"]) <= set(report["isas_built"])
    assert report["backend_registered"] and report["experts_registered"]
    assert report["cuda"] == (why_not() or "usable")
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in report["versions"]["torch"]
    assert 0 < report["memory_available_bytes"] < report["machine"]["memory_bytes"]
    for isa in machine().isas:
        assert report["speeds"][isa]["read_bandwidth"] > 1e8
        assert report["speeds"][isa]["arithmetic"] > 1e7
        for weight_format in FORMATS:
            checked = [c for c in report["checks"] if (c["isa"], c["weight_format"]) == (isa, weight_format)]
            assert {c["dtype"] for c in checked} == {"float32", "float16", "bfloat16"}
            assert all(c["error"] > 0 for c in checked)


def test_doctor_prints_tables_for_people(capsys, monkeypatch):
    checked = list(self_check.check_kernels(activations=self_check.QUICK_ACTIVATIONS[:1]))  # all are in the test before
    monkeypatch.setattr(self_check, "check_kernels", lambda **options: checked)
    assert cli.main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "all is well" in out
    for word in (
        "ISA in use",
        "NUMA nodes",
        "GB/s",
        "GFLOP/s",
        "registered",
        'device "cuda"',
        *machine().isas,
        *FORMATS,
    ):
        assert word in out


def test_doctor_says_when_a_variable_chose_the_isa(capsys, monkeypatch):
    monkeypatch.setenv("KTCOMPILE_ISA", "scalar")
    monkeypatch.setattr(self_check, "check_kernels", lambda **options: ())  # they are in the test before
    machine.cache_clear()
    assert cli.main(["doctor", "--json", "--quick"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["machine"]["isa"], report["isa_reason"]) == ("scalar", "KTCOMPILE_ISA")


def test_doctor_names_a_kernel_that_is_wrong(capsys, monkeypatch):
    right = reference.moe

    def shifted(x, ids, weights, gate_up, down, spec, *biases):
        result = right(x, ids, weights, gate_up, down, spec, *biases)
        return result * 1.5 if spec.activation.kind == "swigluoai" else result

    monkeypatch.setattr(reference, "moe", shifted)
    assert cli.main(["doctor", "--quick"]) == 1
    out, err = capsys.readouterr()
    kernels = len(machine().isas) * len(FORMATS) * 3
    assert f"{kernels} problems" in out
    lines = err.splitlines()
    assert len(lines) == kernels
    assert all("swigluoai" in line for line in lines)
    for isa in machine().isas:
        wanted = f"kernel {isa}/bf16/swigluoai (limit 0.7) on float32 rows has a relative error of 3.33e-01"
        assert any(wanted in line and "the budget is 2e-06" in line for line in lines)


def test_every_activation_is_checked():
    checks = list(self_check.check_kernels(machine().isas[:1]))
    assert len({c.activation for c in checks}) == len(self_check.ACTIVATIONS)
    assert [c.problem for c in checks if not c.ok] == []


def test_a_check_fails_on_what_is_no_number_and_on_rows_that_differ():
    good = self_check.KernelCheck("avx2", "bf16", "float32", "silu", 1e-7, 2e-6, True)
    assert good.ok and good.problem == ""
    assert "error of nan" in replace(good, error=math.nan).problem
    assert "other bits in a batch" in replace(good, rows_equal=False).problem
    assert "failed: no memory" in replace(good, failure="no memory").problem


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("KTCOMPILE_ISA", "neon", "ISA 'neon' is unknown"),
        ("KTCOMPILE_NUM_THREADS", "many", "KTCOMPILE_NUM_THREADS is 'many'"),
        ("KTCOMPILE_FEATURES", "avx2", "KTCOMPILE_FEATURES has 'avx2'"),
    ],
)
@pytest.mark.parametrize("command", [["doctor", "--quick"], ["generate", "x"]])
def test_a_variable_that_cannot_be_used_is_an_error_of_one_line(command, variable, value, message, capsys, monkeypatch):
    monkeypatch.setenv(variable, value)
    machine.cache_clear()
    assert cli.main(command) == 2
    assert message in one_error_line(capsys)


def test_an_isa_that_the_machine_lacks_is_an_error_of_one_line(capsys, monkeypatch):
    monkeypatch.setenv("KTCOMPILE_FEATURES", "-avx512,-avx2")
    monkeypatch.setenv("KTCOMPILE_ISA", "avx2")
    machine.cache_clear()
    assert cli.main(["doctor"]) == 2
    assert "ISA 'avx2' does not run on this machine, which has scalar" in one_error_line(capsys)


def test_the_installed_command_ends_with_its_status():
    environment = {**os.environ, "KTCOMPILE_ISA": "neon"}
    ended = subprocess.run([KTC, "doctor"], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("ktc: error: ISA 'neon'")
    assert ended.stderr.count("\n") == 1


def test_generate_prints_the_prompt_and_its_continuation(model, capsys):
    assert run_generate(model) == 0
    out, err = capsys.readouterr()
    assert out.startswith(PROMPT) and out.endswith("\n") and len(out) > len(PROMPT) + 1
    assert "prefill" in err and "decode 7 tokens" in err and "tokens/s" in err
    assert run_generate(model, "--quiet") == 0
    assert capsys.readouterr() == (out, "")


def test_generate_gives_one_json_object(model, capsys):
    assert run_generate(model, "--quiet") == 0
    text = capsys.readouterr().out
    assert run_generate(model, "--json", "--quiet") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == PROMPT
    assert record["prompt"] + record["text"] + "\n" == text
    assert record["prompt_tokens"] == len(byte_level_tokenizer()(PROMPT)["input_ids"])
    assert record["generated_tokens"] == 8
    for phase in ("load", "prefill", "decode"):
        assert record[f"{phase}_seconds"] > 0
    assert record["decode_tokens_per_second"] == pytest.approx(7 / record["decode_seconds"])
    assert (record["model"], record["isa"], record["threads"]) == (str(model), machine().isa, 1)
    assert (record["weight_format"], record["compiled"], record["compile_reports"]) == ("auto", False, [])


def test_generate_draws_the_same_text_for_the_same_seed(model, capsys):
    def drawn(seed):
        assert run_generate(model, "--quiet", "--temperature", "1.5", "--top-p", "0.95", "--seed", seed) == 0
        return capsys.readouterr().out

    assert drawn("1") == drawn("1")
    assert drawn("1") != drawn("2")


@pytest.mark.parametrize("weight_format", FORMATS)
def test_generate_uses_the_weight_format(weight_format, model, capsys, monkeypatch):
    used = []
    pack = ktcompile.ops.PackedExperts.__init__

    def noted(self, gate_up, down, gate_up_bias, down_bias, spec, *name):
        used.append(spec.weight_format)
        pack(self, gate_up, down, gate_up_bias, down_bias, spec, *name)

    monkeypatch.setattr(ktcompile.ops.PackedExperts, "__init__", noted)
    assert run_generate(model, "--quiet", "--weight-format", weight_format) == 0
    assert used == [weight_format] * 2


def test_a_model_without_experts_runs_but_takes_no_weight_format(tmp_path, capsys):
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert run_generate(tmp_path) == 0
    capsys.readouterr()
    for others in ([], ["--compile"]):
        assert run_generate(tmp_path, "--weight-format", "bf16", *others) == 2
        assert f"{tmp_path} has no experts that could be stored in bf16" in one_error_line(capsys)


def test_generate_compiles_when_asked(tmp_path, capsys):
    model = save_model(tmp_path, layers=1)
    capsys.readouterr()
    assert run_generate(model, "--quiet", "--json") == 0
    expected = json.loads(capsys.readouterr().out)["text"]
    assert run_generate(model, "--quiet", "--json", "--compile", "--max-tokens", "1") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] and expected.startswith(record["text"])
    assert record["compiled"]
    (report,) = record["compile_reports"]
    assert report == {"moe_found": 1, "moe_fused": 1, "fallbacks": []}


@pytest.mark.parametrize("others", [["--max-tokens", "0"], ["--threads", "0"], ["--top-p", "0"]])
def test_generate_refuses_values_out_of_range(others, model, capsys):
    assert run_generate(model, *others) == 2
    one_error_line(capsys)


def test_generate_names_a_model_that_is_not_there(tmp_path, capsys):
    assert run_generate(tmp_path / "absent") == 2
    assert f"there is no directory {tmp_path / 'absent'}" in one_error_line(capsys)
    assert run_generate(tmp_path) == 2
    assert f"{tmp_path / 'config.json'} is missing" in one_error_line(capsys)


def test_generate_names_a_damaged_file(own_model, capsys):
    weights = own_model / "model.safetensors"
    whole = weights.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 5, 0):
        weights.write_bytes(whole[:kept])
        assert run_generate(own_model) == 2
        assert f"{weights} is damaged or was not fully copied" in one_error_line(capsys)
    weights.unlink()
    assert run_generate(own_model) == 2
    assert f"{weights} is missing" in one_error_line(capsys)


def test_generate_names_a_missing_or_damaged_part_of_a_divided_model(own_model, capsys):
    index = own_model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert run_generate(own_model) == 2
    assert f"{own_model / 'model-2.safetensors'} is missing" in one_error_line(capsys)
    index.write_text("{")
    assert run_generate(own_model) == 2
    assert f"{index} is damaged" in one_error_line(capsys)


def test_generate_names_a_model_without_a_tokenizer(own_model, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_model / name).unlink()
    assert run_generate(own_model) == 2
    assert str(own_model) in one_error_line(capsys)


def test_generate_says_what_to_do_without_the_packaged_model(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_model, "__file__", str(tmp_path / "tiny_model.py"))
    with pytest.raises(FileNotFoundError, match=r"examples/train_tiny_moe\.py"):
        tiny_model.path()
    assert cli.main(["generate", PROMPT]) == 2
    assert "name a model" in one_error_line(capsys)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, even where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_there_is(model, capsys, monkeypatch):
    tokens = byte_level_tokenizer()("abc\U0001f600")["input_ids"]

    def interrupted(*_: object) -> Iterator[int]:
        yield from tokens[:-1]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(engine, "generate", interrupted)
    assert run_generate(model, "--json") == 130
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["text"], record["interrupted"]) == ("abc", True)
    assert record["generated_tokens"] == len(tokens) - 1
    assert "decode" in err


def test_ctrl_c_before_the_first_token(model, capsys, monkeypatch):
    def interrupted(*_: object) -> Iterator[int]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(engine, "generate", interrupted)
    assert run_generate(model) == 130
    assert capsys.readouterr().out == PROMPT + "\n"
