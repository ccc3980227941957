"""Models that are loaded ready to call, with experts on the CPU alone or on two sides."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.compare import relative_error
from helpers.quantized_models import KINDS, TOKENS
from helpers.text_model import build_model, save_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import ktcompile
from ktcompile.config import DeviceOptions
from ktcompile.models import hf_experts, streaming
from ktcompile.models import load as loading
from ktcompile.models.placed import attach, move
from ktcompile.ops.experts import PackedExperts
from ktcompile.plan.profile import RoutingProfile
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.placing import placer_for, replan_config
from ktcompile.runtime.split import SplitExperts

IDS = torch.tensor([[17, 3, 250, 99, 42, 42, 7]])
HALF = {"device": "stand-in", "placement": "uniform", "stream_from": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def split_layers(model) -> list[SplitExperts]:
    layers = [hf_experts.packed(module).split for module in hf_experts.experts_modules(model)]
    assert all(isinstance(layer, SplitExperts) for layer in layers)
    return layers


def test_a_model_is_loaded_with_its_experts_packed(folder):
    model = ktcompile.load(folder)
    assert relative_error(logits(model), logits(build_model())) < 1e-5
    assert not model.training
    for module in hf_experts.experts_modules(model):
        assert module.down_proj.isnan().all()
        assert hf_experts.packed(module).split is None


def test_a_weight_format_is_the_one_that_runs(folder):
    model = ktcompile.load(folder, weight_format="int4")
    formats = {hf_experts.packed(module).format.name for module in hf_experts.experts_modules(model)}
    assert formats == {"int4_g32"}


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_experts_on_two_sides_give_the_same_logits(folder, fraction):
    wanted = logits(ktcompile.load(folder))
    model = ktcompile.load(folder, **HALF, device_expert_fraction=fraction)
    layers = split_layers(model)
    assert [len(layer.resident) for layer in layers] == [round(5 * fraction)] * 2
    assert relative_error(logits(model), wanted) < 2e-6
    assert all(layer.activity.calls == 1 for layer in layers)


def test_experts_follow_the_routers_of_a_model_without_a_compiler(folder):
    model = ktcompile.load(folder, device="stand-in", device_expert_fraction=0.4, replan={"interval": 1})
    adaptive = split_layers(model)[0].adaptive
    steps = []
    adaptive.step = lambda do=adaptive.step: steps.append(do())
    for _ in range(3):
        logits(model)
    assert len(steps) == 3
    assert adaptive._config.interval == 1


def test_weights_that_were_written_to_are_placed_anew(folder):
    model = ktcompile.load(folder, **HALF, device_expert_fraction=0.4)
    before = split_layers(model)
    other = build_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    model.load_state_dict(other.state_dict(), assign=True)
    assert relative_error(logits(model), logits(other)) < 1e-5
    after = split_layers(model)
    assert all(new is not old and len(new.resident) == 2 for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("kind", ["fp8", "gptq"])
def test_quantised_checkpoints_run_on_two_sides(kind, tmp_path):
    KINDS[kind].write(tmp_path)
    wanted = logits(streaming.load(tmp_path), TOKENS)
    model = ktcompile.load(tmp_path, **HALF)
    assert all(layer.resident and layer.cpu_bytes for layer in split_layers(model))
    assert relative_error(logits(model, TOKENS), wanted) < 1e-5


def test_a_quantised_model_is_compiled_for_two_sides(tmp_path):
    KINDS["gptq"].write(tmp_path)
    wanted = logits(streaming.load(tmp_path), TOKENS)
    model = streaming.load(tmp_path)
    compiled = torch.compile(model, backend="kt", options={**HALF, "inner": "eager"})
    assert relative_error(logits(compiled, TOKENS), wanted) < 1e-5
    assert all(layer.resident and layer.activity.calls == 1 for layer in split_layers(model))


def test_the_embedded_model_is_loaded_where_none_is_named():
    model = ktcompile.load()
    assert hf_experts.shape(model) == (4, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_format": "int3"}, "weight_format is 'int3'"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of none"),
        ({"divice": "none"}, "option 'divice' of ktcompile.load is unknown; did you mean 'device'?"),
        ({"placement": "counts"}, "placement is 'counts', which needs a routing_profile"),
        ({"replan": {"intervall": 3}}, "replan has 'intervall', which is unknown; did you mean 'interval'?"),
        (
            {"replan": {"interval": 0}},
            "replan has interval=0: interval is 0; it must be a whole number of decode steps",
        ),
        ({"replan": {"interval": 1.5}}, "interval of replan is 1.5; it must be a whole number"),
        ({"replan": {"margin": "much"}}, "margin of replan is 'much'; it must be a number"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(options, words, monkeypatch):
    monkeypatch.setattr(loading, "locate", lambda model: pytest.fail("the model was read"))
    with pytest.raises(ValueError, match=re.escape(words)):
        ktcompile.load("model", **options)


def test_a_profile_must_be_there_and_the_models(folder, tmp_path):
    options = {"device": "stand-in", "placement": "counts", "routing_profile": str(tmp_path / "profile.npz")}
    with pytest.raises(FileNotFoundError, match=re.escape("profile.npz")):
        ktcompile.load(folder, **options)
    RoutingProfile(3, 5).save(tmp_path / "profile.npz")
    with pytest.raises(ValueError, match=r"the profile is of \(3, 5\) layers and experts; the model has \(2, 5\)"):
        ktcompile.load(folder, **options)


def test_a_model_without_experts_has_no_device():
    config = Qwen3Config(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts that a device could have"):
        attach(Qwen3ForCausalLM(config), placer_for(DeviceOptions(device="stand-in")))


def test_every_option_of_the_device_reaches_the_placer(folder, monkeypatch):
    made = {}

    def noted(self, device, fraction, strategy, profile, **others):
        made.update(device=device, fraction=fraction, strategy=strategy, profile=profile, **others)

    monkeypatch.setattr(Placer, "__init__", noted)
    profile = folder / "profile.json"
    RoutingProfile(2, 5).save(profile)
    options = DeviceOptions(
        device="stand-in",
        device_expert_fraction=0.25,
        device_memory=1 << 20,
        keep_cpu_copy=True,
        placement="frequency",
        routing_profile=profile,
        stream_from=9,
        replan=(("margin", 1),),
    )
    placer_for(options)
    assert (made["device"].memory_bytes, made["fraction"], made["strategy"]) == (1 << 20, 0.25, "frequency")
    assert (made["keep_cpu_copy"], made["stream_from"], made["config"]) == (True, 9, replan_config((("margin", 1),)))
    assert made["profile"].shape == (2, 5) and made["config"].margin == 1


def test_weights_are_packed_once(folder, monkeypatch):
    packed = []
    pack = PackedExperts.__init__

    def noted(self, *arguments):
        packed.append(self)
        pack(self, *arguments)

    monkeypatch.setattr(PackedExperts, "__init__", noted)
    logits(ktcompile.load(folder, **HALF))
    assert len(packed) == 2


def test_all_but_the_experts_can_be_moved():
    model = loading.load()
    move(model, torch.device("meta"))
    experts = {id(t) for m in hf_experts.experts_modules(model) for t in (*m.parameters(), *m.buffers())}
    assert experts
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == ("cpu" if id(tensor) in experts else "meta"), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight or not (
        model.config.tie_word_embeddings
    )
