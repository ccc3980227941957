"""GGUF files of Qwen3-MoE checkpoints, with numpy and the package gguf: a peer's Python need not have torch.

python gguf_file.py CHECKPOINT bf16 FILE         the weights of a folder
python gguf_file.py FILE q8_0|q4_k_m OTHER       what llama.cpp makes of such a file
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# A weight of ours, and what the file calls it.
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
_ROUTER = "ffn_gate_inp"
_EMBEDDING = "token_embd.weight"
_QUANTIZED = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def write(checkpoint: Path, file: Path) -> None:
    """Write the bf16 weights of a checkpoint as a file of llama.cpp. ValueError: they are of another architecture."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "qwen3_moe" or config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) > 1:
        raise ValueError("only Qwen3-MoE checkpoints are converted; name a file of the model with --gguf FORMAT=FILE")
    tensors = _Tensors(checkpoint)
    unfinished = file.with_name(file.name + ".part")
    writer = gguf.GGUFWriter(str(unfinished), "qwen3moe")
    _describe(writer, config)
    for name, value in _renamed(tensors, config):
        if value.ndim == 1 or _ROUTER in name:
            writer.add_tensor(name, (value.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(value).view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(file)


def quantize(plain: Path, file: Path, variant: str) -> None:
    """Write what llama.cpp makes of a bf16 file in another format, with its own rule for each tensor."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, _QUANTIZED[variant])
    unfinished = file.with_name(file.name + ".part")
    status = llama_cpp.llama_model_quantize(str(plain).encode(), str(unfinished).encode(), settings)
    if status:
        raise RuntimeError(f"llama.cpp does not quantise {plain} to {variant}: it returned {status}")
    unfinished.replace(file)


def bytes_per_weight(file: Path) -> dict[str, float]:
    """Return bytes of a weight of the routed experts, and of all others that a token's products read."""
    import gguf

    size, count = {"expert": 0, "dense": 0}, {"expert": 0, "dense": 0}
    tensors = gguf.GGUFReader(str(file)).tensors
    shared = not any(t.name == "output.weight" for t in tensors)
    for tensor in tensors:
        if tensor.name == _EMBEDDING and not shared:
            continue
        kind = "expert" if "_exps." in tensor.name else "dense"
        size[kind] += int(tensor.n_bytes)
        count[kind] += int(tensor.n_elements)
    return {f"{kind}_bytes": size[kind] / count[kind] for kind in size if count[kind]}


def _describe(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")


def _experts(config: dict[str, Any]) -> int:
    number: int = config["num_experts" if "num_experts" in config else "num_local_experts"]
    return number


def _renamed(tensors: _Tensors, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for ours, theirs in _OUTER.items():
        if ours in tensors.names:
            yield theirs, tensors.read(ours)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for ours, theirs in _OF_LAYER.items():
            yield f"blk.{layer}.{theirs}.weight", tensors.read(f"{prefix}{ours}.weight")
        for part in ("gate", "up", "down"):
            own = [tensors.read(f"{prefix}mlp.experts.{e}.{part}_proj.weight") for e in range(_experts(config))]
            yield f"blk.{layer}.ffn_{part}_exps.weight", np.stack(own)


class _Tensors:
    """The bf16 tensors of a checkpoint's safetensors, as 16-bit integers."""

    def __init__(self, checkpoint: Path) -> None:
        self._places: dict[str, tuple[Path, int, list[int]]] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{name} is {entry['dtype']}; only bf16 checkpoints are converted")
                self._places[name] = (file, 8 + size + entry["data_offsets"][0], entry["shape"])

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor. ValueError: there is none of that name."""
        if name not in self._places:
            raise ValueError(f"the checkpoint has no {name}")
        file, offset, shape = self._places[name]
        return np.memmap(file, np.uint16, "r", offset, tuple(shape))


if __name__ == "__main__":
    source, variant, target = sys.argv[1:]
    if variant == "bf16":
        write(Path(source), Path(target))
    else:
        quantize(Path(source), Path(target), variant)
