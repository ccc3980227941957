"""Tiny random models and their checkpoints in the formats of other tools, packed here by their public definitions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, GptOssConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ktcompile.quant import FORMATS, QuantizedWeight

# Tensors of a layer by what follows its name, and the weight that they mean.
Packed = tuple[dict[str, Tensor], Tensor]
TOKENS = torch.tensor([[1, 5, 60, 2, 33, 33, 7, 90, 14, 9]])
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_EXPERTS = r"\.mlp\.experts\.\d+\.\w+_proj"


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint. pack: returns the tensors of a weight. layers: a pattern of the names of the layers that
    are quantised. quantization: of config.json. weight_format: of the experts. packed_parameters: experts are stored
    as the parameters of all of them."""

    name: str
    config: PreTrainedConfig
    pack: Callable[[Tensor], Packed]
    quantization: dict[str, Any]
    weight_format: str
    layers: str = _EXPERTS
    packed_parameters: bool = False

    def write(self, folder: Path, shards: int = 2, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Write a quantised checkpoint into `folder`, and return the stock model that holds what it means."""
        torch.manual_seed(0)
        config = replace_config(self.config, dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1 if "router" not in name and ".gate." not in name else 0.5)
                elif "bias" in name:
                    parameter.normal_(std=0.1)
        stored, plain = {}, revert_weight_conversion(model, model.state_dict())
        for name, tensor in list(plain.items()):
            layer = name.removesuffix(".weight")
            if not re.search(self.layers + "$", layer):
                stored[name] = tensor
                continue
            packed, weight = self.pack(tensor.mT.float() if self.packed_parameters else tensor.float())
            stored |= {f"{layer}{part}": t for part, t in packed.items()}
            plain[name] = (weight.mT if self.packed_parameters else weight).to(dtype).contiguous()
        write_checkpoint(folder, config, stored, self.quantization, shards)
        wanted, report = type(model).from_pretrained(
            None, config=config, state_dict=plain, dtype=dtype, output_loading_info=True
        )
        assert not any(report.values()), report
        return wanted.eval()


def replace_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    return type(config)(**{**config.to_dict(), "dtype": str(dtype).removeprefix("torch.")})


def write_checkpoint(
    folder: Path, config: PreTrainedConfig, stored: dict[str, Tensor], quantization: dict[str, Any], shards: int
) -> None:
    """Write config.json, the tensors in `shards` files, and an index of them."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), "quantization_config": quantization, "architectures": [architecture(config)]}
    (folder / "config.json").write_text(json.dumps(values))
    weight_map, names = {}, list(stored)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        some = names[i::shards]  # what belongs together lies apart
        save_file({name: stored[name].clone(memory_format=torch.contiguous_format) for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def architecture(config: PreTrainedConfig) -> str:
    return {"qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}.get(
        config.model_type, "GptOssForCausalLM"
    )


def words(nibbles: Tensor) -> Tensor:
    """Return nibbles [..., 8 W] as int32 [..., W], the first in the lowest bits."""
    packed = sum(nibbles.long()[..., i::8] << 4 * i for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def fp8_blocks(weight: Tensor) -> Packed:
    q = FORMATS["fp8"].quantize(weight)
    return {".weight": q.codes.view(torch.float8_e4m3fn), ".weight_scale_inv": q.scales[::128]}, q.dequantize()


def fp8_channel(weight: Tensor) -> Packed:
    q = FORMATS["fp8_channel"].quantize(weight)
    scales = q.scales.bfloat16()
    q = replace(q, scales=scales.float())
    tensors = {".weight": q.codes.view(torch.float8_e4m3fn), ".weight_scale": scales, ".input_scale": torch.ones(1)}
    return tensors, q.dequantize()


def gptq(weight: Tensor) -> Packed:
    q = _halved(FORMATS["int4_g32"].quantize(weight))
    zeros = torch.full_like(q.scales.T, 7)
    order = torch.arange(weight.shape[1]).int() // 32
    parts = {".qweight": words(q.codes).T, ".qzeros": words(zeros), ".scales": q.scales.T.half(), ".g_idx": order}
    return parts, q.dequantize()


def gptq_v2(weight: Tensor) -> Packed:
    q = _halved(FORMATS["int4_g64_zp"].quantize(weight))
    assert q.zeros is not None
    parts = {".qweight": words(q.codes).T, ".qzeros": words(q.zeros.T), ".scales": q.scales.T.half()}
    return parts, q.dequantize()


def awq(weight: Tensor) -> Packed:
    q = _halved(FORMATS["int4_g32_zp"].quantize(weight))
    assert q.zeros is not None

    def ordered(nibbles: Tensor) -> Tensor:
        return words(nibbles.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2))

    return {".qweight": ordered(q.codes.T), ".qzeros": ordered(q.zeros.T), ".scales": q.scales.T.half()}, q.dequantize()


def compressed_int4(weight: Tensor) -> Packed:
    q = FORMATS["int4_g32"].quantize(weight)
    shape = torch.tensor(weight.shape)
    parts = {".weight_packed": words(q.codes), ".weight_scale": q.scales.bfloat16(), ".weight_shape": shape}
    return parts, q.dequantize()


def compressed_int4_zeros(weight: Tensor) -> Packed:
    q = FORMATS["int4_g32_zp"].quantize(weight)
    assert q.zeros is not None
    parts, _ = compressed_int4(weight)
    parts |= {".weight_packed": words(q.codes), ".weight_scale": q.scales.bfloat16()}
    return parts | {".weight_zero_point": words(q.zeros.T).T}, q.dequantize()


def mxfp4(weight: Tensor) -> Packed:
    q = FORMATS["mxfp4"].quantize(weight)
    blocks = (q.codes[..., 0::2] | q.codes[..., 1::2] << 4).unflatten(-1, (-1, 16))
    return {"_blocks": blocks, "_scales": (q.scales.log2() + 127).byte()}, q.dequantize()


def _halved(q: QuantizedWeight) -> QuantizedWeight:
    return replace(q, scales=q.scales.half().float())


def _compressed(stored_as: str, **weights: object) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": {"group_0": group}}


QWEN = Qwen3MoeConfig(
    vocab_size=97,
    hidden_size=160,
    intermediate_size=48,
    moe_intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    num_experts=11,
    num_experts_per_tok=3,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)
DEEPSEEK = DeepseekV3Config(
    vocab_size=97,
    hidden_size=160,
    intermediate_size=200,
    moe_intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=14,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
GPT_OSS = GptOssConfig(
    vocab_size=97,
    hidden_size=160,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    num_local_experts=5,
    num_experts_per_tok=3,
    sliding_window=4,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_EVERY_LAYER = r"_proj|_proj_with_mqa|_[ab]_proj"
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}

KINDS = {
    kind.name: kind
    for kind in (
        Kind("fp8", QWEN, fp8_blocks, _FP8, "fp8"),
        Kind("fp8 of all layers", DEEPSEEK, fp8_blocks, _FP8, "fp8", _EVERY_LAYER),
        Kind(
            "mxfp4", GPT_OSS, mxfp4, {"quant_method": "mxfp4"}, "mxfp4", r"\.experts\.\w+_proj", packed_parameters=True
        ),
        Kind("gptq", QWEN, gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, "int4_g32"),
        Kind(
            "gptq of all layers",
            QWEN,
            gptq_v2,
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
            "int4_g64_zp",
            rf"{_EXPERTS}|[qo]_proj",
        ),
        Kind("awq", QWEN, awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "int4_g32_zp"),
        Kind("compressed int4", QWEN, compressed_int4, _compressed("pack-quantized", **_INT4), "int4_g32"),
        Kind(
            "compressed int4 with zeros",
            QWEN,
            compressed_int4_zeros,
            _compressed("pack-quantized", **_INT4, symmetric=False),
            "int4_g32_zp",
        ),
        Kind(
            "compressed fp8",
            QWEN,
            fp8_channel,
            _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
            "fp8_channel",
            _EVERY_LAYER,
        ),
    )
}
