"""Checkpoints that are not quantised, read an expert at a time, against models that transformers loads whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from helpers.compare import assert_exact
from helpers.quantized_models import DEEPSEEK, GPT_OSS, QWEN, TOKENS, replace_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig

import ktcompile
from ktcompile import log
from ktcompile.models import checkpoint, hf_experts, streaming
from ktcompile.models.expert_weights import ExpertsParameter

SINGLE = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
MIXTRAL = MixtralConfig(
    vocab_size=97,
    hidden_size=160,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    num_local_experts=5,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
GLM4 = Glm4MoeConfig(
    vocab_size=97,
    hidden_size=160,
    intermediate_size=48,
    moe_intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)


@dataclass(frozen=True)
class Stored:
    """A way to store a model. fused: as the model's own parameters; else as its authors store it. shards: of about
    how many files."""

    config: object
    layers: int
    dtype: torch.dtype = torch.bfloat16
    fused: bool = False
    shards: int = 1

    def write(self, folder):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(replace_config(self.config, self.dtype), dtype=self.dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 or "bias" in name:
                    parameter.normal_(std=0.1)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=size if self.shards == 1 else size // self.shards)
        if self.fused:
            own = {n: t.contiguous() for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
            save_file(own, folder / SINGLE)
        return folder


WAYS = {
    "qwen3_moe": Stored(QWEN, 2),
    "qwen3_moe in shards, fp32": Stored(QWEN, 2, torch.float32, shards=4),
    "qwen3_moe fused": Stored(QWEN, 2, fused=True),
    "mixtral": Stored(MIXTRAL, 2),
    "deepseek_v3": Stored(DEEPSEEK, 2, shards=3),
    "gpt_oss": Stored(GPT_OSS, 2),
    "gpt_oss fused, fp16": Stored(GPT_OSS, 2, torch.float16, fused=True),
    "glm4_moe": Stored(GLM4, 2),
}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def folder(tmp_path):
    return WAYS["qwen3_moe"].write(tmp_path)


def loaded_whole(folder, weight_format="auto"):
    """Return the model as transformers reads it, its experts packed when all of it is in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="kt").eval()
    for module in hf_experts.configure(model, weight_format):
        hf_experts.take(module)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def rewrite(folder, change, file=SINGLE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def names_in(folder):
    return [name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()]  # noqa: SIM118


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_bit_is_that_of_a_model_loaded_whole(way, tmp_path):
    way.write(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) >= way.shards
    assert any(re.search(r"experts\.\d", name) for name in names_in(tmp_path)) != (way.fused or way.config is GPT_OSS)
    for weight_format in ("auto", "int8", "int4"):
        wanted, got = loaded_whole(tmp_path, weight_format), streaming.load(tmp_path, weight_format)
        pairs = list(zip(*map(hf_experts.experts_modules, (wanted, got)), strict=True))
        assert len(pairs) == way.layers and all(hf_experts.is_packed(module) for _, module in pairs)
        for one, other in pairs:
            packed, streamed = hf_experts.packed(one), hf_experts.packed(other)
            assert packed.format is streamed.format and packed.nbytes == streamed.nbytes
            for expert in range(packed.num_experts):
                for stored, read in zip(packed.unpack(expert), streamed.unpack(expert), strict=True):
                    assert_exact(read, stored)
        assert_exact(logits(got), logits(wanted))
        state, whole = got.state_dict(), wanted.state_dict()
        assert state.keys() == whole.keys()
        for name, tensor in whole.items():
            assert_exact(state[name], tensor, name)
        assert not got.training and {p.dtype for p in got.parameters()} == {p.dtype for p in wanted.parameters()}


def test_tied_embeddings_are_one_tensor(folder):
    assert not any("lm_head" in name for name in names_in(folder))
    model = streaming.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_weights_become_the_dtype_of_the_model(dtype, tmp_path):
    """That of config.json, or of the weights where it names none."""
    WAYS["qwen3_moe in shards, fp32"].write(tmp_path)
    file = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if "dtype" not in k}
    file.write_text(json.dumps({**config, "dtype": dtype} if dtype else config))
    wanted, got = loaded_whole(tmp_path), streaming.load(tmp_path)
    module = hf_experts.experts_modules(got)[0]
    assert hf_experts.packed(module).format.name == ("bf16" if dtype else "fp32")
    assert got.dtype == wanted.dtype
    assert_exact(logits(got), logits(wanted))


def test_nothing_of_the_experts_is_whole_in_memory(folder):
    for module in hf_experts.experts_modules(ktcompile.load(folder)):
        for parameter in (module.gate_up_proj, module.down_proj):
            assert parameter.isnan().all() and parameter.untyped_storage().nbytes() == 2


def test_weights_that_are_assigned_get_the_format_that_was_asked_for(folder):
    model = ktcompile.load(folder, weight_format="int8")
    wanted = logits(model)
    model.load_state_dict(loaded_whole(folder).state_dict(), assign=True)
    assert_exact(logits(model), wanted)
    assert {hf_experts.packed(m).format.name for m in hf_experts.experts_modules(model)} == {"int8"}


@pytest.mark.parametrize("load", [ktcompile.load, streaming.load])
def test_a_conversion_that_is_not_known_is_left_to_transformers(load, folder, monkeypatch, caplog):
    wanted = logits(loaded_whole(folder, "int8"))

    def unknown(self, shapes, pattern, names):
        raise RuntimeError("rows are mixed")

    monkeypatch.setattr(ExpertsParameter, "_converted", unknown)
    log.warn_once.cache_clear()
    model = load(folder, weight_format="int8")
    (record,) = [r for r in caplog.records if "read whole" in r.message]
    assert record.message.startswith("Qwen3MoeExperts: experts are read whole before they are packed")
    assert "rows are mixed" in record.message
    assert not any(map(hf_experts.is_packed, model.modules()))
    if load is ktcompile.load:
        assert_exact(logits(model), wanted)
        assert all(module.down_proj.isnan().all() for module in hf_experts.experts_modules(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(EXPERT), f"lacks {EXPERT}; other experts of the layer are there"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (
            lambda t: [t.pop(n) for n in list(t) if "1.mlp.experts" in n and "down" in n],
            "lacks model.layers.1.mlp.experts.down_proj",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT][:-1].clone()}),
            rf"{SINGLE}: {EXPERT} is [95, 160]; that of other experts is [96, 160]",
        ),
        (
            lambda t: t.update({n: v[:, :-1].clone() for n, v in t.items() if ".experts." in n and "down" not in n}),
            f"{SINGLE}: model.layers.0.mlp.experts.0.gate_proj.weight: 22 weights of [[96, 159]] do not make "
            "model.layers.0.mlp.experts.gate_up_proj [11, 192, 160]",
        ),
        (lambda t: t.update({EXPERT: t[EXPERT].int()}), f"{SINGLE}: {EXPERT} is torch.int32; a weight of experts"),
        (lambda t: t.update({EXPERT: t[EXPERT].char()}), f"{SINGLE}: {EXPERT} is torch.int8 without scales"),
        (
            lambda t: t.update({EXPERT: t[EXPERT].fill_(torch.nan)}),
            "model.layers.1.mlp.experts: gate_up_proj of expert 3 has nan at matrix 0, row 96",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()}),
            f"{SINGLE}: model.norm.weight gives model.norm.weight [159]; it must be [160]",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}),
            f"{SINGLE}: model.norm.weight is torch.int32; model.norm.weight has a fraction",
        ),
    ],
)
def test_what_is_wrong_is_named(change, words, folder):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ktcompile.load(folder, weight_format="int8")
    assert str(folder) in str(caught.value)


def test_a_fused_tensor_of_another_shape_is_named(tmp_path):
    WAYS["qwen3_moe fused"].write(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(tmp_path, lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(ValueError, match=re.escape(f"{SINGLE}: {name} gives {name} [10, 160, 96]; it must be [11,")):
        ktcompile.load(tmp_path)


def test_damaged_files_are_named(folder):
    file = folder / SINGLE
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged or was not fully copied"):
        ktcompile.load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(file))} is missing"):
        ktcompile.load(folder)
    index = folder / f"{SINGLE}.index.json"
    for content in ('{"weight_map": {"a": "../other.safetensors"}}', '{"weight_map": {}}', '{"weight_map": 3}', "[]"):
        index.write_text(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(index))} is damaged"):
            ktcompile.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_nothing_is_unpickled(name, folder):
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} has its weights in {name} and not in safetensors"):
        ktcompile.load(folder)


def test_layers_are_tracked(folder):
    seen = []

    def track(layers):
        for layer in layers:
            seen.append(layer.path)
            yield layer

    ktcompile.load(folder, track=track)
    assert seen == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_of_the_hub_is_downloaded_without_other_forms_of_it(shards, folder, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    wanted = logits(streaming.load(folder))
    hub = Stored(QWEN, 2, shards=shards).write(tmp_path / "hub")
    asked = []

    def download(model, name):
        assert model == "owner/name"
        if not (hub / name).is_file():
            raise EntryNotFoundError(name)
        return str(hub / name)

    def snapshot(model, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_exact(logits(ktcompile.load("owner/name")), wanted)
    assert sorted(n for n in asked if n.endswith("safetensors")) == sorted(p.name for p in hub.glob("*.safetensors"))


def test_a_model_that_the_hub_does_not_give_is_named(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="cannot load the model owner/name: no connection"):
        checkpoint.fetch("owner/name")


# In a process of its own: what others used would count.
MEMORY = """
import sys, ktcompile
from ktcompile.models import hf_experts

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

ktcompile.load()
before = peak()
model = ktcompile.load(sys.argv[1], weight_format=sys.argv[2])
peak = peak() - before
packed = sum(hf_experts.packed(m).nbytes for m in hf_experts.experts_modules(model))
dense = sum(p.untyped_storage().nbytes() for p in model.parameters())
print(packed, dense, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("fused", "weight_format", "share"), [(False, "int8", 0.5), (True, "auto", 1.0)])
def test_memory_holds_what_is_packed_and_little_else(fused, weight_format, share, tmp_path):
    sizes = {"num_hidden_layers": 4, "num_experts": 32, "num_local_experts": 32, "hidden_size": 1024}
    config = type(QWEN)(**{**QWEN.to_dict(), **sizes, "moe_intermediate_size": 768})
    Stored(config, 4, fused=fused).write(tmp_path)
    stored = (tmp_path / SINGLE).stat().st_size
    command = [sys.executable, "-c", MEMORY, tmp_path, weight_format]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    packed, dense, peak = map(int, result.stdout.split())
    assert stored > 5e8 and share * stored * 0.9 < packed + dense < share * stored * 1.1
    assert peak < packed + dense + 12e7  # of threads, and of Python's and torch's own
