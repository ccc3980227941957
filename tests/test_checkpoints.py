"""Checkpoints that are quantised: what their configuration says, the names of their tensors, and their weights."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.compare import assert_exact
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ktcompile.quant import FORMATS, checkpoints, stored
from ktcompile.quant.checkpoints import detect, join_rows, stack

LAYER = "model.layers.0.mlp.experts"
UP = f"{LAYER}.3.up_proj"
E4M3 = torch.float8_e4m3fn


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).int()


def random_bytes(*shape: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0)).byte()


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1


def random_fp8(*shape: int) -> Tensor:
    return (random_bytes(*shape).float() - 128).to(E4M3)


def config(**quantization) -> dict[str, object]:
    return {"model_type": "qwen3_moe", "quantization_config": quantization}


def compressed(stored_as: str, **weights) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return config(quant_method="compressed-tensors", format=stored_as, config_groups={"group_0": group})


def int4(**weights) -> dict[str, object]:
    return compressed("pack-quantized", **({"num_bits": 4, "type": "int", "strategy": "group"} | weights))


def float8(**weights) -> dict[str, object]:
    return compressed("float-quantized", **({"num_bits": 8, "type": "float"} | weights))


def test_a_model_that_is_not_quantised():
    for each in ({}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {"hidden_size": 8}}):
        assert detect(each) is None


def test_the_configuration_may_be_in_the_text_model():
    fp8 = config(quant_method="fp8", weight_block_size=[128, 128])
    assert detect({"text_config": fp8}) == detect(fp8)
    assert detect({"compression_config": int4(group_size=32)["quantization_config"]}) == detect(int4(group_size=32))


@pytest.mark.parametrize(
    ("given", "names", "wanted"),
    [
        (config(quant_method="fp8", weight_block_size=[128, 128]), (".weight", ".weight_scale_inv"), (128, 128)),
        (config(quant_method="fp8", weight_block_size=[64, 128], fmt="e4m3"), (".weight", ".weight_scale"), (64, 128)),
        (config(quant_method="fp8", weight_block_size=[1, 128]), (".weight", ".scale"), (1, 128)),
        (config(quant_method="fp8"), (".weight", ".weight_scale_inv"), None),
        (float8(strategy="channel"), (".weight", ".weight_scale"), None),
        (float8(strategy="block", block_structure=[128, 128]), (".weight", ".weight_scale"), (128, 128)),
    ],
)
def test_fp8(given, names, wanted):
    weight = random_fp8(256, 384)
    scale = uniform(256, 1) if wanted is None else uniform(256 // wanted[0], 3)
    tensors = {UP + names[0]: weight, UP + names[1]: scale}
    reader = detect(given)
    assert reader.reads(tensors, UP) and not reader.reads(tensors, f"{LAYER}.0.up_proj")
    assert_exact(reader.read(tensors, UP).dequantize(), stored.read_fp8(weight, scale, wanted, "w").dequantize())


@pytest.mark.parametrize("block", ((128, 128), None))
@pytest.mark.parametrize("intermediate", (128, 96))
def test_fp8_of_a_module_of_transformers(block, intermediate):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    sizes = {"hidden_size": 256, "moe_intermediate_size": intermediate, "num_experts": 3, "hidden_act": "silu"}
    names = ("swiglu_alpha", "swiglu_limit", "mlp_gate_softcap", "mlp_up_softcap")
    module = fp8.FP8Experts(SimpleNamespace(**sizes, **dict.fromkeys(names)), block)
    tensors = {f"{LAYER}.{name}": t for name, t in module.state_dict().items()}
    for tensor in tensors.values():
        tensor.copy_(random_fp8(*tensor.shape) if tensor.dtype == E4M3 else uniform(*tensor.shape))
    reader = detect(config(quant_method="fp8", weight_block_size=block))
    gate_up, down = (reader.read(tensors, f"{LAYER}.{name}") for name in ("gate_up_proj", "down_proj"))
    assert gate_up.shape == (3, 2 * intermediate, 256) and down.shape == (3, 256, intermediate)
    scale = tensors[f"{LAYER}.gate_up_proj_scale_inv"]
    for part in (0, 1):
        rows = slice(part * intermediate, (part + 1) * intermediate)
        weight, own = tensors[f"{LAYER}.gate_up_proj"][:, rows], scale[:, part : part + 1]
        wanted = stored.read_fp8(weight, own, block, "w").dequantize()
        assert_exact(gate_up.dequantize()[:, rows], wanted)
    one, two = tensors[f"{LAYER}.down_proj"], tensors[f"{LAYER}.down_proj_scale_inv"]
    assert_exact(down.dequantize(), stored.read_fp8(one, two, block, "w").dequantize())


def test_mxfp4():
    blocks, scales = random_bytes(2, 6, 3, 16), random_bytes(2, 6, 3, high=255)
    name = f"{LAYER}.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    reader = detect(config(quant_method="mxfp4", modules_to_not_convert=["lm_head"]))
    assert reader.reads(tensors, name) and not reader.reads(tensors, f"{LAYER}.down_proj")
    assert_exact(reader.read(tensors, name).dequantize(), stored.read_mxfp4(blocks, scales, "w").dequantize())


def test_experts_of_four_bits_in_a_checkpoint_of_fp8():
    packed, scale = random_bytes(6, 48).view(torch.int8), random_bytes(6, 3, high=255).view(torch.float8_e8m0fnu)
    reader = detect(config(quant_method="fp8", weight_block_size=[128, 128], scale_fmt="ue8m0", expert_dtype="fp4"))
    made = reader.read({f"{UP}.weight": packed, f"{UP}.scale": scale}, UP)
    assert made.format.name == "mxfp4" and made.shape == (6, 96)


@pytest.mark.parametrize(
    ("options", "offset"), [({}, 1), ({"checkpoint_format": "gptq"}, 1), ({"checkpoint_format": "gptq_v2"}, 0)]
)
@pytest.mark.parametrize("symmetric", (True, False))
def test_gptq(options, offset, symmetric):
    zeros = (0x77777777 if offset else -0x77777778) if symmetric else 0x12345678
    tensors = {
        f"{UP}.qweight": random_words(16, 24),
        f"{UP}.qzeros": torch.full((4, 3), zeros, dtype=torch.int32),
        f"{UP}.scales": uniform(4, 24).half(),
        f"{UP}.g_idx": torch.arange(128).int() // 32,
    }
    reader = detect(config(quant_method="gptq", bits=4, group_size=32, desc_act=True, sym=symmetric, **options))
    assert reader.reads(tensors, UP)
    wanted = stored.read_gptq(*tensors.values(), 32, "w", symmetric=symmetric, zero_offset=offset)
    assert_exact(reader.read(tensors, UP).dequantize(), wanted.dequantize())
    assert (wanted.zeros is None) == symmetric
    del tensors[f"{UP}.g_idx"]
    assert_exact(reader.read(tensors, UP).dequantize(), wanted.dequantize())


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        {"w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        {"bits": 4, "group_size": 64, "format": "gemm"},
    ],
)
def test_awq(options):
    parts = random_words(128, 2), random_words(2, 2), uniform(2, 16).half()
    tensors = {UP + suffix: t for suffix, t in zip((".qweight", ".qzeros", ".scales"), parts, strict=True)}
    reader = detect(config(quant_method="awq", **options))
    assert reader.reads(tensors, UP)
    assert_exact(reader.read(tensors, UP).dequantize(), stored.read_awq(*parts, 64, "w").dequantize())


@pytest.mark.parametrize("group_size", (32, 128, None))
@pytest.mark.parametrize("with_zeros", (True, False))
def test_packed_int4(group_size, with_zeros):
    packed = random_words(8, 32)
    scale = uniform(8, 256 // group_size if group_size else 1).bfloat16()
    zeros = random_words(1, scale.shape[1]) if with_zeros else None
    tensors = {
        f"{UP}.weight_packed": packed,
        f"{UP}.weight_scale": scale,
        f"{UP}.weight_shape": torch.tensor([8, 256]),
        f"{UP}.weight_g_idx": torch.full((256,), -1),
    }
    if zeros is not None:
        tensors[f"{UP}.weight_zero_point"] = zeros
    reader = detect(int4(group_size=group_size, strategy="group" if group_size else "channel"))
    wanted = stored.read_packed_int4(packed, scale, zeros, None, 256, group_size or 0, "w").dequantize()
    assert reader.reads(tensors, UP)
    assert_exact(reader.read(tensors, UP).dequantize(), wanted)
    del tensors[f"{UP}.weight_shape"]
    assert_exact(reader.read(tensors, UP).dequantize(), wanted)


def test_compressed_tensors_of_several_schemes():
    def group(stored_as: str, **weights) -> dict[str, object]:
        return {"format": stored_as, "weights": weights}

    groups = {
        "attention": group("float-quantized", num_bits=8, type="float", strategy="channel"),
        "experts": group("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        "others": group("int-quantized", num_bits=8, type="int", strategy="channel"),
    }
    reader = detect(config(quant_method="compressed-tensors", format="mixed-precision", config_groups=groups))
    made = reader.read({"q.weight": random_fp8(16, 64), "q.weight_scale": uniform(16, 1)}, "q")
    assert made.format.name == "fp8_channel"
    made = reader.read({f"{UP}.weight_packed": random_words(8, 8), f"{UP}.weight_scale": uniform(8, 2)}, UP)
    assert made.format.name == "int4_g32"
    words = "which not exactly one group of quantization_config describes; quantization_config.config_groups.others"
    with pytest.raises(ValueError, match=re.escape(f"{UP} is of 64 columns with scales [8, 3], {words}")):
        reader.read({f"{UP}.weight_packed": random_words(8, 8), f"{UP}.weight_scale": uniform(8, 3)}, UP)
    with pytest.raises(ValueError, match=r"q is \[16, 64\] with scales \[16, 2\]"):
        reader.read({"q.weight": random_fp8(16, 64), "q.weight_scale": uniform(16, 2)}, "q")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            config(quant_method="bitsandbytes"),
            "quant_method is 'bitsandbytes', which is not supported (only fp8, mxfp4",
        ),
        (config(bits=4), "quant_method is None"),
        (config(quant_method="fp8", fmt="e5m2"), "fmt is 'e5m2'"),
        (config(quant_method="fp8", weight_block_size=[128, 64]), "weight_block_size is [128, 64]"),
        (config(quant_method="fp8", weight_block_size=128), "weight_block_size is 128"),
        (config(quant_method="gptq", bits=8, group_size=32), "bits is 8, which is not supported (only 4)"),
        (config(quant_method="gptq", group_size=32), "bits is None"),
        (config(quant_method="gptq", bits=4, group_size=16), "group_size is 16"),
        (config(quant_method="gptq", bits=4), "group_size is None"),
        (
            config(quant_method="gptq", bits=4, group_size=32, checkpoint_format="marlin"),
            "checkpoint_format is 'marlin'",
        ),
        (config(quant_method="awq", bits=3, group_size=32), "bits is 3"),
        (config(quant_method="awq", bits=4, group_size=32, version="gemv"), "version is 'gemv'"),
        (config(quant_method="awq", bits=4, group_size=32, zero_point=False), "zero_point is False"),
        (int4(num_bits=8), "config_groups.group_0.weights.num_bits is 8"),
        (int4(strategy="tensor"), "config_groups.group_0.weights.strategy is 'tensor'"),
        (int4(type="float"), "config_groups.group_0.weights.type is 'float'"),
        (float8(strategy="group"), "config_groups.group_0.weights.strategy is 'group'"),
        (float8(strategy="block", block_structure=[128]), "config_groups.group_0.weights.block_structure is [128]"),
        (compressed("int-quantized", num_bits=8), "config_groups.group_0.format is 'int-quantized'"),
        (config(quant_method="compressed-tensors"), "config_groups is empty"),
    ],
)
def test_what_is_not_supported_is_named(given, words):
    with pytest.raises(ValueError, match=re.escape(f"quantization_config.{words}")) as caught:
        detect(given)
    assert "use the model's checkpoint that is not quantised, with the option weight_format" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (config(quant_method="fp8"), f"{UP}.weight, {UP}.weight_scale_inv"),
        (config(quant_method="mxfp4"), f"{UP}_blocks, {UP}_scales"),
        (config(quant_method="gptq", bits=4, group_size=32), f"{UP}.qweight, {UP}.qzeros, {UP}.scales"),
        (config(quant_method="awq", bits=4, group_size=32), f"{UP}.qweight, {UP}.qzeros, {UP}.scales"),
        (int4(group_size=32), f"{UP}.weight, {UP}.weight_scale"),
    ],
)
def test_a_weight_that_was_left_out(given, missing):
    tensors = {f"{UP}.weight": torch.ones(4, 4)}
    reader = detect(given)
    assert not reader.reads(tensors, UP)
    with pytest.raises(ValueError, match=re.escape(f"{UP} is not stored as quantised; it must have {missing}")):
        reader.read(tensors, UP)


def test_from_a_file(tmp_path):
    tensors = {}
    for e in range(2):
        for name in ("gate_proj", "up_proj"):
            tensors[f"{LAYER}.{e}.{name}.weight"] = random_fp8(128, 256).roll(e, 0)
            tensors[f"{LAYER}.{e}.{name}.weight_scale_inv"] = uniform(1, 2) + e
    save_file(tensors, tmp_path / "model.safetensors")
    reader = detect(config(quant_method="fp8", weight_block_size=[128, 128]))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    experts = [
        join_rows([reader.read(loaded, f"{LAYER}.{e}.{name}") for name in ("gate_proj", "up_proj")]) for e in range(2)
    ]
    made = stack(experts)
    assert made.shape == (2, 256, 256) and made.scales.shape == (2, 256, 2)
    for e in range(2):
        for part, name in enumerate(("gate_proj", "up_proj")):
            weight, scale = tensors[f"{LAYER}.{e}.{name}.weight"], tensors[f"{LAYER}.{e}.{name}.weight_scale_inv"]
            wanted = weight.float() * scale.repeat_interleave(128, 1)
            assert_exact(made.dequantize()[e, part * 128 : part * 128 + 128], wanted)


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.codec is not None])
def test_weights_as_one(name):
    w = torch.randn(3, 128, 160, generator=torch.Generator().manual_seed(0))
    apart = [FORMATS[name].quantize(each) for each in w]
    assert_exact(stack(apart).dequantize(), FORMATS[name].round_trip(w))
    assert_exact(join_rows(apart).dequantize(), FORMATS[name].round_trip(w.flatten(0, 1)))


def test_weights_that_cannot_be_one():
    int8, fp8 = (FORMATS[name].quantize(torch.ones(4, 32)) for name in ("int8", "fp8"))
    with pytest.raises(ValueError, match=r"weights of formats fp8, int8 and shapes .* cannot be one weight"):
        stack([int8, fp8])
    other = FORMATS["int8"].quantize(torch.ones(5, 32))
    with pytest.raises(ValueError, match=r"shapes \[\[4, 32\], \[5, 32\]\] cannot be one weight"):
        stack([int8, other])
    assert join_rows([int8, other]).shape == (9, 32)
    with pytest.raises(ValueError, match="cannot be one weight"):
        join_rows([int8, FORMATS["int8"].quantize(torch.ones(4, 33))])


def test_every_reader_is_a_reader():
    readers: list[checkpoints.Reader] = [
        checkpoints.Fp8Reader(None),
        checkpoints.Mxfp4Reader(),
        checkpoints.GptqReader(32, True, 1),
        checkpoints.AwqReader(32),
        checkpoints.CompressedTensorsReader((32,), (), ()),
    ]
    assert not any(reader.reads({}, UP) for reader in readers)
