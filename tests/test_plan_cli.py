"""`ktc plan`: what it prints, its JSON, its exit status, and what it refuses."""

from __future__ import annotations

import json
import shlex

import pytest
from helpers.text_model import save_model

from ktcompile import cli
from ktcompile.bench import this_machine
from ktcompile.bench.this_machine import memory_bytes
from ktcompile.cli import plan as command
from ktcompile.cli.sizes import human, size
from ktcompile.machine import machine
from ktcompile.plan.hardware import PRESETS, Hardware
from ktcompile.quant import FORMATS

LARGE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
KEYS = {
    "fits", "model", "hardware", "weight_format", "context", "batch", "expert_bytes", "memory", "load_peak_bytes",
    "device_expert_fraction", "device_experts_per_layer", "kv_capacity_tokens", "simulated", "predictions", "formats",
    "warnings", "notes", "assumptions", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path):
    def write(**changes):
        file = tmp_path / "large.json"
        file.write_text(json.dumps(LARGE | changes))
        return str(file)

    return write


def plan(*arguments):
    return cli.main(["plan", *map(str, arguments)])


def as_json(capsys, *arguments):
    status = plan(*arguments, "--json")
    return status, json.loads(capsys.readouterr().out)


def test_the_embedded_model_on_this_machine(capsys):
    assert plan() == 0
    out, err = capsys.readouterr()
    for word in (machine().cpu[:20], "16 of 256 x 128, 4 for a token", "decode, batch 1", "prefill, 2,048 tokens"):
        assert word in out
    assert out.endswith("it fits\nrun it: ktc generate 'Once upon a time'\n")
    assert err == ""


def test_a_folder_on_a_preset(folder, capsys):
    status, found = as_json(capsys, folder, "--hardware", "laptop", "--weight-format", "int4")
    assert status == 0 and found.keys() == KEYS
    assert (found["fits"], found["simulated"], found["weight_format"]) == (True, True, "int4_g32")
    assert found["command"] == f"ktc generate --model {folder} --weight-format int4 'Once upon a time'"
    assert found["hardware"]["name"] == "laptop"
    assert [e["num_experts"] for e in found["model"]["moe_layers"]] == [5, 5]
    assert {(p["kind"], p["tokens"]) for p in found["predictions"]} == {
        ("decode", 1),
        ("decode", 8),
        ("prefill", 512),
        ("prefill", 2048),
    }
    assert all(p["tokens_per_second"] > 0 for p in found["predictions"])
    assert {f["weight_format"] for f in found["formats"]} <= FORMATS.keys()
    assert found["memory"]["device"] is None and found["memory"]["ram"]["experts"] == found["expert_bytes"]
    assert found["warnings"] == ["the device is not used: the CPU alone is predicted to be faster"]


def test_a_large_model_split_between_gpu_and_cpu(config, capsys):
    arguments = [config(), "--hardware", "4090-ddr5", "--context", "32768", "--batch", "2", "--disk", "1TB"]
    status, found = as_json(capsys, *arguments)
    assert status == 0
    assert found["model"]["parameters"] == pytest.approx(30.5e9, rel=0.01)
    assert found["expert_bytes"] == 48 * 128 * 3 * 2048 * 768 * 2
    assert found["memory"]["device"]["cache"] == 2 * 32768 * 48 * 2 * 4 * 128 * 2
    assert found["memory"]["disk"]["capacity"] == 10**12
    assert 0 < found["device_expert_fraction"] < 0.5
    assert found["kv_capacity_tokens"] >= 32768
    assert ("decode", 2) in {(p["kind"], p["tokens"]) for p in found["predictions"]}
    assert found["command"] is None  # there are no weights
    assert plan(*arguments) == 0
    out = capsys.readouterr().out
    assert "note: sizes are those of the configuration alone" in out and "of experts on the device" in out
    assert all(len(line) <= 80 for line in out.splitlines() if "─" in line)


@pytest.mark.parametrize("devices", [("none", "stand-in"), ("none", "stand-in", "cuda")])
def test_the_command_is_one_that_works(devices, folder, monkeypatch, capsys):
    """Where this version knows GPUs, it names one; where it does not, it says that the command runs on the CPU."""
    monkeypatch.setattr(command, "DEVICES", devices)
    arguments = ["--hardware", "4090-ddr5", "--device-expert-fraction", "0.7"]
    status, found = as_json(capsys, folder, *arguments)
    assert status == 0 and found["device_expert_fraction"] == 0.6
    words = shlex.split(found["command"])
    parsed = cli._parser().parse_args([w.replace("cuda", "stand-in") for w in words[1:]])
    assert (parsed.command, parsed.model) == ("generate", str(folder))
    noted = any("'ktc generate' of this version knows no GPU" in note for note in found["notes"])
    if "cuda" in devices:
        assert words[4:8] == ["--device", "cuda", "--device-expert-fraction", "0.60"] and not noted
    else:
        assert "--device" not in words and noted


def test_no_command_is_printed_where_the_cpu_alone_has_no_room(folder, monkeypatch, capsys):
    monkeypatch.setattr(command, "DEVICES", ("none", "stand-in"))
    arguments = [folder, "--hardware", "4090-ddr5", "--context", "100000", "--batch", "64"]
    split, alone = (as_json(capsys, *arguments, *more)[1] for more in ((), ("--gpu-memory", "0")))
    ram = split["memory"]["ram"]
    enough = max(ram["used"], split["load_peak_bytes"] + ram["reserve"])
    assert split["memory"]["device"] and split["command"] and enough < alone["memory"]["ram"]["used"]
    status, found = as_json(capsys, *arguments, "--ram", enough)
    assert (status, found["command"]) == (0, None)


def test_what_does_not_fit_has_status_1_and_advice(config, capsys):
    assert plan(config(), "--hardware", "laptop") == 1
    out = capsys.readouterr().out
    assert "warning: does not fit: it needs" in out and "fp8 fits (29.9 GB of experts)" in out
    assert out.endswith("it does not fit\n")
    status, found = as_json(capsys, config(), "--hardware", "laptop", "--weight-format", "int4")
    assert (status, found["fits"]) == (0, True)  # a bf16 checkpoint is packed as it is read
    assert found["load_peak_bytes"] < 2 * found["expert_bytes"] and found["predictions"]


def test_a_quantised_checkpoint_stays_as_it_is(config, capsys):
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    file = config(quantization_config=quantization)
    status, found = as_json(capsys, file, "--hardware", "laptop")
    assert (status, found["weight_format"], found["model"]["stored_format"]) == (0, "int4_g128", "int4_g128")
    _, found = as_json(capsys, file, "--hardware", "4090-ddr5", "--weight-format", "int8")
    assert any("quantised as int4_g128; int8 needs one that is not" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8_channel"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "int4_g64_zp"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, "int4_g32_zp"),
    ],
)
def test_formats_of_quantised_checkpoints(config, capsys, quantization, name):
    _, found = as_json(capsys, config(quantization_config=quantization, num_hidden_layers=1), "--hardware", "laptop")
    assert found["weight_format"] == name


def test_a_gpu_that_is_not_there_is_assumed(monkeypatch, capsys):
    alone = Hardware("this", PRESETS["laptop"].cpu)
    monkeypatch.setattr(this_machine, "this_machine", lambda threads: alone)
    _, found = as_json(capsys, "--gpu-memory", "12GB", "--ram", "64GiB")
    assert found["hardware"]["device"]["memory_bytes"] == 12 * 10**9
    assert found["hardware"]["cpu"]["memory_bytes"] == 64 * 2**30
    assert any("this has no GPU" in note for note in found["notes"])
    _, found = as_json(capsys)
    assert found["hardware"]["device"] is None and found["memory"]["device"] is None


def test_no_gpu_is_a_gpu_of_nothing(capsys):
    _, found = as_json(capsys, "--hardware", "laptop", "--gpu-memory", "0")
    assert found["hardware"]["device"] is None and found["hardware"]["link"] is None


def test_a_container_has_less_memory(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(this_machine, "_LIMIT", limit)
    for text, expected in (("max", machine().memory_bytes), ("1000", 1000)):
        limit.write_text(text)
        assert memory_bytes() == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "5090"], "'5090'; it must be this or one of 4090-ddr5"),
        (["--weight-format", "int3"], "'int3'; it must be one of auto"),
        (["--device-expert-fraction", "2"], "device_expert_fraction is 2.0; it must be from 0 to 1"),
        (["--device-expert-fraction", "0.5", "--gpu-memory", "0"], "laptop has no device"),
        (["--context", "0"], "context is 0; it must be at least 1"),
        (["--batch", "-1"], "batch is -1; it must be at least 1"),
        (["--ram", "0"], "--ram is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["./nowhere"], "no folder and no config.json"),
        (["nowhere/config.json"], "no folder and no config.json"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, words):
    assert plan("--hardware", "laptop", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ktc: error: ") and err.count("\n") == 1
    assert words in err


def test_a_size_that_is_none(capsys):
    with pytest.raises(SystemExit) as ended:
        plan("--ram", "many")
    assert ended.value.code == 2
    assert "'many' is no size; write it as 24GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("24GB", 24 * 10**9), ("22.5 GiB", 22.5 * 2**30), ("800mb", 8 * 10**8), ("1TB", 10**12), ("2g", 2e9)],
)
def test_sizes(text, expected):
    assert size(text) == expected


def test_sizes_are_printed():
    assert (human(24e9), human(3_500_000)) == ("24.0 GB", "3.5 MB")
