"""Processes that run whole models: their protocol, with peers that are not there, and the drivers of those that are."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fake_vllm import FAKE_VLLM
from helpers.model_reports import contender

from ktcompile.bench.model import process as model_process
from ktcompile.bench.model.demand import Work
from ktcompile.bench.model.process import ModelProcess, Settings, gguf
from ktcompile.bench.process import ContenderError
from ktcompile.models import tiny_model

DRIVERS = Path(model_process.__file__).with_name("drivers")
DECODE, PREFILL = Work("decode", 3), Work("prefill", 100)


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path / "model", (DECODE, PREFILL), 4, 1, "dynamic", tmp_path / "gguf", {}, 60.0)


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return contender("vllm", python=sys.executable)


@pytest.fixture
def start():
    """Return a function that starts a process which the test's end closes."""
    started = []

    def make(who, settings):
        started.append(ModelProcess(who, settings))
        return started[-1]

    yield make
    for process in started:
        process.close()


def test_a_process_loads_decodes_and_prefills(fake_vllm, settings, start):
    process = start(fake_vllm, settings)
    loaded = process.set_up()
    assert 0 <= loaded.load_seconds < 30 and loaded.resident_bytes > 1 << 20 and loaded.facts == {}
    assert loaded.versions["python"] == sys.version.split()[0]
    seconds, tokens, peak = process.time(DECODE, 0, 4)
    assert len(seconds) == 4 and len(tokens) == 3 and all(0 <= t < 50 for t in tokens)
    assert peak >= loaded.resident_bytes
    # Prompts depend on the work and the turn, on nothing else.
    assert process.time(DECODE, 0, 2)[1] == tokens != process.time(DECODE, 1, 2)[1]
    seconds, tokens, _ = process.time(PREFILL, 0, 3)
    assert len(seconds) == 3 and tokens == []


def test_a_process_is_stopped_while_it_is_not_its_turn(fake_vllm, settings, start):
    process = start(fake_vllm, settings)
    process.set_up()
    state = Path(f"/proc/{process._process.pid}/stat")
    for _ in range(1000):  # the signal takes its time
        if state.read_text().rpartition(")")[2].split()[0] == "T":
            break
    else:
        pytest.fail("it runs")
    process.time(DECODE, 0, 1)


def test_what_goes_wrong_is_a_reason_of_one_line(fake_vllm, settings, start):
    broken = start(fake_vllm, replace(settings, folder=Path("broken")))
    with pytest.raises(ContenderError, match=r"^RuntimeError: cannot$"):
        broken.set_up()
    assert broken.alive
    fatal = start(fake_vllm, replace(settings, folder=Path("fatal")))
    with pytest.raises(ContenderError, match="ended by SIGABRT"):
        fatal.set_up()
    assert not fatal.alive
    absent = start(
        contender("llama.cpp:bf16", python=sys.executable), replace(settings, gguf_files={"bf16": Path("f")})
    )
    with pytest.raises(ContenderError, match="ModuleNotFoundError: No module named"):
        absent.set_up()


def test_a_process_that_does_not_answer_is_ended(settings, start, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(contender("vllm", python=sys.executable), replace(settings, patience=0.5))
    with pytest.raises(ContenderError, match="ended by SIGKILL"):
        process.set_up()


def test_transformers_kinds_agree_with_each_cache(monkeypatch, one_torch_thread):
    monkeypatch.syspath_prepend(str(DRIVERS))
    import transformers_driver

    request = {"model": str(tiny_model.path()), "threads": 1, "steps": 4}
    prompts = [list(range(3, 20)), list(range(40, 57))]
    chosen, logits = [], []
    with torch.no_grad():
        for kind, variant, cache in (
            ("transformers", "eager", "dynamic"),
            ("transformers", "", "static"),
            ("kt-eager", "", "dynamic"),
        ):
            driver = transformers_driver.load({**request, "kind": kind, "variant": variant, "cache": cache})
            for _ in range(2):  # the second time in a cache that was used
                driver.start(prompts)
                chosen.append([driver.step() for _ in range(3)])
                driver.finish()
            logits.append(driver.logits(prompts[0]))
            assert logits[-1].argmax() == chosen[0][0][0]
    assert np.abs(logits[0] - logits[1:]).max() < 0.2 and logits[0].dtype == np.float32
    assert driver.vocab_size == 4096 and driver.facts == {}
    assert all(tokens == chosen[0] for tokens in chosen) and len({tuple(t) for t in chosen[0]}) > 1


def test_the_engine_chooses_what_the_model_alone_does(monkeypatch, one_torch_thread):
    monkeypatch.syspath_prepend(str(DRIVERS))
    import kt_engine_driver
    import transformers_driver

    request = {"model": str(tiny_model.path()), "threads": 1, "steps": 4, "variant": "", "requests": 2, "length": 30}
    prompts = [list(range(3, 20)), list(range(40, 57))]
    with torch.no_grad():  # the driver turns gradients off for good
        alone = transformers_driver.load({**request, "kind": "kt-eager", "cache": "dynamic"})
        engine = kt_engine_driver.load(request)
        chosen = []
        for driver in (alone, engine, engine):  # the second time after an end
            driver.start(prompts)
            chosen.append([driver.step() for _ in range(3)])
            driver.finish()
    assert chosen[0] == chosen[1] == chosen[2] and len({tuple(tokens) for tokens in chosen[0]}) > 1
    assert engine.vocab_size == 4096 and engine.facts["kv_blocks"] >= 2


@pytest.fixture
def gguf_package(monkeypatch):
    """Stand in for the package gguf; return what is written, by name."""
    written = {}

    class Writer:
        def __init__(self, path, architecture):
            self.path, written["architecture"] = Path(path), architecture

        def __getattr__(self, name):
            if name.startswith("add_"):
                return lambda value: written.__setitem__(name.removeprefix("add_"), value)
            return lambda: self.path.write_bytes(b"GGUF")

        def add_tensor(self, name, value, raw_dtype=None):
            written[name] = (value, raw_dtype)

    module = types.ModuleType("gguf")
    module.GGUFWriter = Writer
    module.LlamaFileType = types.SimpleNamespace(MOSTLY_BF16=32)
    module.GGMLQuantizationType = types.SimpleNamespace(BF16="BF16")
    monkeypatch.setitem(sys.modules, "gguf", module)
    monkeypatch.syspath_prepend(str(DRIVERS))
    return written, module


def test_a_checkpoint_is_written_as_gguf(gguf_package, tmp_path):
    import gguf_file
    from safetensors.torch import load_file

    written, _ = gguf_package
    gguf_file.write(tiny_model.path(), tmp_path / "bf16.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["bf16.gguf"]
    assert (written["architecture"], written["expert_count"], written["head_count_kv"]) == ("qwen3moe", 16, 4)
    source = load_file(tiny_model.path() / "model.safetensors")
    experts, kind = written["blk.3.ffn_up_exps.weight"]
    assert kind == "BF16" and experts.shape == (16, 128, 2 * 256)  # bytes
    expected = source["model.layers.3.mlp.experts.5.up_proj.weight"].view(dtype=torch.int16).numpy()
    np.testing.assert_array_equal(np.ascontiguousarray(experts[5]).view(np.int16), expected)
    norm, kind = written["blk.0.attn_norm.weight"]
    assert kind is None and norm.dtype == np.float32
    np.testing.assert_array_equal(norm, source["model.layers.0.input_layernorm.weight"].float().numpy())
    assert written["blk.0.ffn_gate_inp.weight"][0].dtype == np.float32
    assert "token_embd.weight" in written and "output.weight" not in written  # the tiny model shares them


def test_other_checkpoints_are_not_written_as_gguf(gguf_package, tmp_path):
    import gguf_file

    config = json.loads((tiny_model.path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    with pytest.raises(ValueError, match="only Qwen3-MoE checkpoints are converted; name a file"):
        gguf_file.write(tmp_path, tmp_path / "bf16.gguf")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the checkpoint has no model\.layers\.0"):
        gguf_file.write(tmp_path, tmp_path / "bf16.gguf")


def test_bytes_of_weights_are_those_of_the_file(gguf_package):
    import gguf_file

    _, module = gguf_package

    def tensor(name, size, count):
        return types.SimpleNamespace(name=name, n_bytes=size, n_elements=count)

    own = [tensor("blk.0.ffn_up_exps.weight", 50, 100), tensor("blk.0.attn_q.weight", 20, 20)]
    table, head = tensor("token_embd.weight", 70, 10), tensor("output.weight", 40, 20)
    module.GGUFReader = lambda path: types.SimpleNamespace(tensors=[*own, table, head])
    assert gguf_file.bytes_per_weight(Path("f")) == {"expert_bytes": 0.5, "dense_bytes": 1.5}
    module.GGUFReader = lambda path: types.SimpleNamespace(tensors=[*own, table])
    assert gguf_file.bytes_per_weight(Path("f"))["dense_bytes"] == 3.0


def test_gguf_files_are_made_once_and_of_each_other(settings, monkeypatch):
    asked = []

    def convert(python, arguments):
        asked.append(arguments[1])
        Path(arguments[2]).write_bytes(b"")

    monkeypatch.setattr(model_process, "_convert", convert)
    folder = settings.gguf_folder
    assert gguf(contender("llama.cpp:q8_0"), settings) == folder / "q8_0.gguf"
    assert gguf(contender("llama.cpp:bf16"), settings) == folder / "bf16.gguf"
    assert gguf(contender("llama.cpp:q8_0"), settings) == folder / "q8_0.gguf"
    assert asked == ["bf16", "q8_0"]
    given = replace(settings, gguf_files={"q4_k_m": Path("mine.gguf")})
    assert gguf(contender("llama.cpp:q4_k_m"), given) == Path("mine.gguf") and len(asked) == 2


def test_a_file_that_cannot_be_made_is_a_reason(settings):
    settings.folder.mkdir()
    with pytest.raises(ContenderError, match="no GGUF file: "):
        gguf(contender("llama.cpp:bf16", python=sys.executable), settings)
