"""What is derived of a model from its configuration and headers, beside the real model."""

from __future__ import annotations

import json
import time

import pytest
import torch
from helpers.quantized_models import KINDS
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from ktcompile.models import tiny_model
from ktcompile.models.facts import architecture
from ktcompile.models.source import ModelSource, describe_source
from ktcompile.models.tensor_files import read_header
from ktcompile.plan.architecture import LayerCache

COMMON = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {"num_key_value_heads": 2, "head_dim": 24}
FULL, SLIDING = LayerCache(2 * 2 * 24 * 2), LayerCache(2 * 2 * 24 * 2, 7)
# Of the gated delta rule: a convolution's input in bf16, then the state in fp32.
LINEAR = LayerCache(0, None, (2 * 2 * 16 + 4 * 16) * 4 * 2 + 4 * 16 * 16 * 4)

# The configuration, the cache of each layer by hand, which layers have experts.
CASES = {
    "qwen3_moe": (
        Qwen3MoeConfig(
            **COMMON,
            **GQA,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
        ),
        [FULL] * 4,
        [1],
    ),
    "deepseek_v3": (
        DeepseekV3Config(
            **COMMON,
            n_routed_experts=8,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=40,
            q_lora_rank=48,
            qk_rope_head_dim=16,
            qk_nope_head_dim=32,
            v_head_dim=24,
            n_group=2,
            topk_group=1,
        ),
        [LayerCache((40 + 16) * 2)] * 4,
        [1, 2, 3],
    ),
    "gpt_oss": (
        GptOssConfig(**COMMON, **GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        [SLIDING, FULL] * 2,
        [0, 1, 2, 3],
    ),
    "mixtral": (
        MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
        [LayerCache(2 * 2 * 16 * 2)] * 4,
        [0, 1, 2, 3],
    ),
    "qwen3_next": (
        Qwen3NextConfig(
            **COMMON,
            **GQA,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_conv_kernel_dim=4,
        ),
        [LINEAR] * 3 + [FULL],
        [0, 1, 2, 3],
    ),
    "glm4_moe": (
        Glm4MoeConfig(
            **COMMON,
            **GQA,
            n_routed_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_shared_experts=1,
            first_k_dense_replace=2,
            tie_word_embeddings=True,
        ),
        [FULL] * 4,
        [2, 3],
    ),
}

# Configurations as published, and the parameters that their authors state: all, and of one token.
QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}
LARGE = {
    "qwen3-235b": (QWEN3_235B, 235e9, 22e9, 94 * 2 * 4 * 128 * 2, "bf16"),
    "deepseek-v3": (DEEPSEEK_V3, 671e9, 37e9, 61 * (512 + 64) * 2, "fp8"),
    "gpt-oss-120b": (GPT_OSS_120B, 116.8e9, 5.1e9 + 0.58e9, 36 * 2 * 8 * 64 * 2, "mxfp4"),
}


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    """A saved model: its folder, the loaded model, and what it must be."""
    config, cache, layers = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), tuple(cache), layers


def experts_of(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "has_gate")}


def test_bytes_are_those_of_the_loaded_model(case):
    folder, model, _, _ = case
    found = architecture(describe_source(folder))
    routed = [p for m in experts_of(model).values() for p in m.parameters()]
    others = [t for t in (*model.parameters(), *model.buffers()) if not any(t is p for p in routed)]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.expert_parameters == sum(p.numel() for p in routed)
    assert found.dense_bytes == sum(t.numel() * t.element_size() for t in others)
    assert found.stored_bytes == sum(
        t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values()
    )
    assert found.stored_format == "bf16"
    assert found.notes == ()


def test_layers_with_experts_and_what_they_select(case):
    folder, model, _, layers = case
    found = architecture(describe_source(folder))
    fields = model.config.to_dict()
    assert [e.layer for e in found.experts] == layers
    for facts, module in zip(found.experts, experts_of(model).values(), strict=True):
        assert facts.top_k == fields["num_experts_per_tok"]
        assert facts.num_experts == module.down_proj.shape[0]
        assert facts.parameters == sum(p.numel() for p in module.parameters())


def test_the_cache_is_the_one_computed_by_hand(case):
    folder, _, cache, _ = case
    assert architecture(describe_source(folder)).cache == cache


def test_the_cache_is_what_the_model_fills(case):
    folder, model, _, _ = case
    with torch.no_grad():
        kept = model(input_ids=torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    real = 0
    for layer in kept.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            real += sum(t.numel() * t.element_size() for t in parts if torch.is_tensor(t) and t.is_floating_point())
    assert architecture(describe_source(folder)).cache_bytes(20) == real


def test_flops_and_reads_leave_out_tables_of_embeddings(case):
    folder, model, _, _ = case
    found = architecture(describe_source(folder))
    table = 0 if model.config.tie_word_embeddings else 99 * 64 * 2
    buffers = sum(t.numel() * t.element_size() for t in model.buffers())
    assert found.dense_read_bytes == found.dense_bytes - table - buffers
    assert found.dense_read_bytes * 0.95 < found.dense_flops_per_token <= found.dense_read_bytes


@pytest.mark.parametrize("name", LARGE)
def test_large_models_have_their_published_sizes(name):
    config, parameters, active, kv, stored = LARGE[name]
    begin = time.perf_counter()
    found = architecture(ModelSource(name, config, None))
    assert time.perf_counter() - begin < 20  # some 2 s on an idle machine
    assert found.parameters == pytest.approx(parameters, rel=0.01)
    assert found.active_parameters == pytest.approx(active, rel=0.02)
    assert found.kv_bytes_per_token == kv
    assert found.stored_format == stored
    assert found.notes == ()


def test_a_renamed_architecture_is_found_by_its_class():
    config = DEEPSEEK_V3 | {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 5}
    found = architecture(ModelSource("kimi", config, None))
    assert (len(found.experts), found.model_type, found.notes) == (2, "kimi_k2", ())


@pytest.mark.parametrize("name", LARGE)
def test_fields_alone_come_near(name):
    config, parameters, _, kv, _ = LARGE[name]
    found = architecture(ModelSource(name, config | {"model_type": "unheard_of"}, None))
    assert found.parameters == pytest.approx(parameters, rel=0.01)
    assert sum(layer.bytes_per_token for layer in found.cache) == kv
    assert "unheard_of" in found.notes[0] and "fields of the configuration" in found.notes[0]


def test_a_checkpoint_that_does_not_fit_its_configuration_is_reported(tmp_path):
    CASES["mixtral"][0].save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "model.safetensors")
    (note,) = architecture(describe_source(tmp_path)).notes
    assert "fewer than its configuration asks for" in note


@pytest.mark.parametrize("name", KINDS)
def test_quantised_checkpoints_agree_with_their_configuration(name, tmp_path):
    kind = KINDS[name]
    model = kind.write(tmp_path)
    found = architecture(describe_source(tmp_path))
    assert (found.stored_format, found.notes) == (kind.weight_format, ())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.stored_bytes == sum(t.size for f in tmp_path.glob("*.safetensors") for t in read_header(f))


def test_without_weights_the_configuration_is_enough(tmp_path):
    config = CASES["qwen3_moe"][0]
    config.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        found = architecture(describe_source(place))
        assert found.stored_bytes == 2 * found.parameters
        assert "configuration alone" in found.notes[0]


def test_missing_shards_are_counted(tmp_path):
    CASES["qwen3_moe"][0].save_pretrained(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "2 of 2 files of weights are missing" in describe_source(tmp_path).notes[0]


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        describe_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder and no config"):
        describe_source(tmp_path / "absent")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        describe_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        describe_source(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(100)}, file)
    whole = file.read_bytes()
    for content, reason in ((b"x", "damaged"), (b"\xff" * 100, "damaged"), (whole[:-4], "not fully copied")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            read_header(file)


def test_numbers_that_json_cannot_hold_are_read():
    from transformers import GraniteMoeHybridConfig

    config = GraniteMoeHybridConfig(num_hidden_layers=2, layer_types=["mamba", "attention"], num_local_experts=4)
    raw = json.loads(config.to_json_string(use_diff=False))
    assert raw["time_step_limit"][1] == {"__float__": "Infinity"}
    assert architecture(ModelSource("granite", raw, None)).notes == ()


def test_a_model_of_text_and_images_is_described():
    from transformers import Qwen3VLMoeConfig

    raw = json.loads(Qwen3VLMoeConfig(text_config={"num_hidden_layers": 2}).to_json_string(use_diff=False))
    found = architecture(ModelSource("vl", raw, None))
    assert len(found.experts) == len(found.cache) == 2
    assert "no plain language model" in found.notes[0]


def test_a_configuration_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no num_hidden_layers"):
        architecture(ModelSource("x", {"model_type": "unheard_of"}, None))


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*args, **keywords):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"'owner/name' \(no route to host\); download its config.json"):
        describe_source("owner/name")


def test_a_hub_model_is_described_by_what_the_hub_sends(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    CASES["mixtral"][0].save_pretrained(tmp_path)
    tensor = TensorInfo(dtype="BF16", shape=[64], data_offsets=(0, 128))
    file = SafetensorsFileMetadata(metadata={}, tensors={"model.norm.weight": tensor})
    headers = SafetensorsRepoMetadata({}, False, {"model.norm.weight": "a"}, {"a": file})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model, name: str(tmp_path / name))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda model: headers)
    found = describe_source("owner/name")
    assert (found.name, found.loadable, found.notes) == ("owner/name", True, ())
    assert [(t.name, t.dtype, t.elements, t.size) for t in found.tensors] == [("model.norm.weight", "BF16", 64, 128)]

    def fail(model):
        raise OSError("gone")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fail)
    found = describe_source("owner/name")
    assert found.tensors is None and "does not give headers" in found.notes[0]


def test_the_embedded_model():
    found = architecture(describe_source(tiny_model.path()))
    assert (len(found.experts), found.experts[0].num_experts, found.experts[0].top_k) == (4, 16, 4)
    assert found.notes == ()
