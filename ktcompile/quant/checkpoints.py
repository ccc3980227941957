"""Checkpoints whose weights are quantised: which kind one is, and its weights as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ktcompile.quant.formats import QuantizedWeight
from ktcompile.quant.stored import read_awq, read_fp8, read_gptq, read_mxfp4, read_packed_int4

Config = Mapping[str, Any]

# What a name ends with after that of a layer, and after that of a parameter. Of the activations' scales nothing is
# read: weights alone are quantised here.
_LAYER_PARTS = (
    *("weight", "weight_scale_inv", "weight_scale", "scale"),
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_zero_point", "activation_scale"),
)
_PARAMETER_PARTS = ("_blocks", "_scales", "_scale_inv", "_activation_scale", "")
_PLAIN_SOURCE = "use the model's checkpoint that is not quantised, with the option weight_format"


class Reader(Protocol):
    """Reads the weights of a checkpoint.

    tensors: by name, such as a state dict or what opens safetensors files. name: of a linear layer, as
    "model.layers.0.mlp.experts.3.up_proj", or of the parameter of all experts, "model.layers.0.mlp.experts.down_proj".
    """

    def reads(self, tensors: Mapping[str, Tensor], name: str) -> bool:
        """Return whether the weight `name` is stored quantised; layers that were left out of it are not."""

    def read(self, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        """Return the weight `name`, [N, K] or [E, N, K]. ValueError: it cannot be read, and why."""


def detect(config: Config) -> Reader | None:
    """Return what reads the weights of a model, None if they are not quantised.

    config: the contents of its config.json. ValueError: weights are quantised in a way that is not supported.
    """
    quantization = _find_quantization(config)
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method not in _READERS:
        raise ValueError(_unsupported("quant_method", method, ", ".join(_READERS)))
    return _READERS[method](quantization)


def parameters(reader: Reader, tensors: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Return the names of the parameters that a checkpoint stands for, each with the name of its weight for `reader`,
    or with None where it is stored as it is."""
    found: dict[str, str | None] = {}
    for stored in tensors:
        layer, _, part = stored.rpartition(".")
        if part in _LAYER_PARTS and reader.reads(tensors, layer):
            found[f"{layer}.weight"] = layer
            continue
        wholes = [stored.removesuffix(part) for part in _PARAMETER_PARTS if stored.endswith(part)]
        whole = next((name for name in wholes if reader.reads(tensors, name)), None)
        found[whole or stored] = whole
    return found


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return weights [N, K] as one [E, N, K]. ValueError: they differ in format or shape."""
    return _combined(weights, torch.stack, 0)


def join_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return weights with their rows one after another, as gate and up. ValueError: they differ in format or
    columns."""
    return _combined(weights, torch.cat, -2)


def place_rows(weights: list[QuantizedWeight], places: Sequence[Tensor], shape: tuple[int, int]) -> QuantizedWeight:
    """Return weights [..., N, K] as one [E, N, K].

    places: for each row of a weight the row of the result, counted over all experts. shape: (E, N). weights: is
    emptied, each when it was copied, so that all of them are in memory about once. ValueError: they differ in format
    or columns.
    """
    _check_alike(weights, {w.shape[-1] for w in weights})
    first, matrices = weights[0], (w.shape[:-1].numel() for w in weights)
    assert sum(matrices) == shape[0] * shape[1]
    codes, scales = (torch.empty(*shape, t.shape[-1], dtype=t.dtype) for t in (first.codes, first.scales))
    zeros = None if first.zeros is None else torch.empty(scales.shape, dtype=first.zeros.dtype)
    weights.reverse()
    for rows in places:
        weight = weights.pop()
        for whole, part in ((codes, weight.codes), (scales, weight.scales), (zeros, weight.zeros)):
            if whole is not None and part is not None:
                whole.view(-1, whole.shape[-1]).index_copy_(0, rows, part.reshape(-1, part.shape[-1]))
    return QuantizedWeight(first.format, codes, scales, zeros)


@dataclass(frozen=True, slots=True)
class Fp8Reader:
    """Of DeepSeek, Qwen and transformers: "weight" and "weight_scale_inv" of a layer, or a parameter and its
    "_scale_inv". block: as for `read_fp8`. Where gate and up are one parameter, each has blocks of its own.
    """

    block: tuple[int, int] | None

    def reads(self, tensors: Mapping[str, Tensor], name: str) -> bool:
        return self._names(tensors, name) is not None

    def read(self, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        names = self._names(tensors, name)
        if names is None:
            raise ValueError(_missing(name, (".weight", ".weight_scale_inv")))
        weight, scale = tensors[names[0]], tensors[names[1]]
        if weight.dtype == torch.int8:  # DeepSeek V4 stores experts of four bits as pairs
            return read_mxfp4(weight, scale, name)
        return read_fp8(weight, scale, self.block, name, parts=2 if name.endswith("gate_up_proj") else 1)

    def _names(self, tensors: Mapping[str, Tensor], name: str) -> tuple[str, str] | None:
        for weight, scales in (
            (f"{name}.weight", (f"{name}.weight_scale_inv", f"{name}.weight_scale", f"{name}.scale")),
            (name, (f"{name}_scale_inv",)),
        ):
            for scale in scales:
                if weight in tensors and scale in tensors:
                    return weight, scale
        return None


@dataclass(frozen=True, slots=True)
class Mxfp4Reader:
    """Of gpt-oss: a parameter's "_blocks" and "_scales". Rows of gate and up alternate, as they do in the model."""

    def reads(self, tensors: Mapping[str, Tensor], name: str) -> bool:
        return f"{name}_blocks" in tensors

    def read(self, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        blocks, scales = _parts(tensors, name, ("_blocks", "_scales"))
        return read_mxfp4(blocks, scales, name)


@dataclass(frozen=True, slots=True)
class GptqReader:
    """Of GPTQ: "qweight", "qzeros", "scales" and, in most, "g_idx" of a layer. Fields: as for `read_gptq`."""

    group_size: int
    symmetric: bool
    zero_offset: int

    def reads(self, tensors: Mapping[str, Tensor], name: str) -> bool:
        return f"{name}.qweight" in tensors

    def read(self, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        qweight, qzeros, scales = _parts(tensors, name, (".qweight", ".qzeros", ".scales"))
        group_of_column = tensors.get(f"{name}.g_idx")
        return read_gptq(
            qweight,
            qzeros,
            scales,
            group_of_column,
            self.group_size,
            name,
            symmetric=self.symmetric,
            zero_offset=self.zero_offset,
        )


@dataclass(frozen=True, slots=True)
class AwqReader:
    """Of AWQ: "qweight", "qzeros" and "scales" of a layer. group_size: 0 is all columns."""

    group_size: int

    def reads(self, tensors: Mapping[str, Tensor], name: str) -> bool:
        return f"{name}.qweight" in tensors

    def read(self, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        qweight, qzeros, scales = _parts(tensors, name, (".qweight", ".qzeros", ".scales"))
        return read_awq(qweight, qzeros, scales, self.group_size, name)


@dataclass(frozen=True, slots=True)
class CompressedTensorsReader:
    """Of compressed-tensors: "weight_packed" with "weight_scale", or a "weight" of fp8 with "weight_scale".

    group_sizes: of the groups of four bits in the configuration. blocks: of those of fp8. problems: what else it has
    that is not supported, which matters only to the weights that are stored so.
    """

    group_sizes: tuple[int, ...]
    blocks: tuple[tuple[int, int] | None, ...]
    problems: tuple[str, ...]

    def reads(self, tensors: Mapping[str, Tensor], name: str) -> bool:
        return f"{name}.weight_scale" in tensors

    def read(self, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        if f"{name}.weight_packed" in tensors:
            return self._read_int4(tensors, name)
        weight, scale = _parts(tensors, name, (".weight", ".weight_scale"))
        fitting = {b for b in self.blocks if scale.numel() in _scale_counts(weight, b)}
        if len(fitting) != 1:
            raise ValueError(self._does_not_fit(name, f"{list(weight.shape)} with scales {list(scale.shape)}"))
        return read_fp8(weight, scale, fitting.pop(), name)

    def _read_int4(self, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        packed, scale = _parts(tensors, name, (".weight_packed", ".weight_scale"))
        shape = tensors.get(f"{name}.weight_shape")
        columns = packed.shape[-1] * 8 if shape is None else int(shape[-1])
        sizes = {min(g or columns, columns) for g in self.group_sizes}
        fitting = {size for size in sizes if scale.shape[-1] == -(-columns // size)}
        if len(fitting) != 1:
            raise ValueError(self._does_not_fit(name, f"of {columns} columns with scales {list(scale.shape)}"))
        group_of_column = tensors.get(f"{name}.weight_g_idx")
        if group_of_column is not None and (group_of_column < 0).any():
            group_of_column = None  # it was made, but not used
        zero_point, size = tensors.get(f"{name}.weight_zero_point"), fitting.pop()
        group_size = 0 if size == columns else size
        return read_packed_int4(packed, scale, zero_point, group_of_column, columns, group_size, name)

    def _does_not_fit(self, name: str, stored: str) -> str:
        return "; ".join(
            (f"{name} is {stored}, which not exactly one group of quantization_config describes", *self.problems)
        )


def _fp8(quantization: Config) -> Reader:
    fmt = quantization.get("fmt", "e4m3")
    if fmt != "e4m3":
        raise ValueError(_unsupported("fmt", fmt, "e4m3"))
    block = quantization.get("weight_block_size")
    return Fp8Reader(None if block is None else _block(block, "weight_block_size"))


def _mxfp4(quantization: Config) -> Reader:
    return Mxfp4Reader()


def _gptq(quantization: Config) -> Reader:
    _check_bits(quantization, "bits")
    # Without a name it is version 1, which was there before versions were.
    version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(_unsupported("checkpoint_format", version, "gptq, gptq_v2"))
    # Whether columns lie apart (desc_act) is decided by g_idx: it may be true where it changed nothing.
    return GptqReader(_group_size(quantization), bool(quantization.get("sym", True)), 1 if version == "gptq" else 0)


def _awq(quantization: Config) -> Reader:
    _check_bits(quantization, "w_bit" if "w_bit" in quantization else "bits")
    version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(_unsupported("version", version, "gemm"))
    if not quantization.get("zero_point", True):
        raise ValueError(_unsupported("zero_point", False, "true"))
    return AwqReader(_group_size(quantization))


def _compressed_tensors(quantization: Config) -> Reader:
    group_sizes: list[int] = []
    blocks: list[tuple[int, int] | None] = []
    problems: list[str] = []
    for name, group in quantization.get("config_groups", {}).items():
        where = f"config_groups.{name}"
        stored = group.get("format") or quantization.get("format")
        weights = group.get("weights") or {}
        try:
            if stored == "pack-quantized":
                group_sizes.append(_packed_group_size(weights, where))
            elif stored in ("float-quantized", "naive-quantized"):
                blocks.append(_float_block(weights, where))
            else:
                raise ValueError(_unsupported(f"{where}.format", stored, "pack-quantized, float-quantized"))
        except ValueError as error:
            problems.append(str(error))
    if not group_sizes and not blocks:
        raise ValueError("; ".join(problems) or "quantization_config.config_groups is empty; " + _PLAIN_SOURCE)
    return CompressedTensorsReader(tuple(group_sizes), tuple(blocks), tuple(problems))


_READERS = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}


def _packed_group_size(weights: Config, where: str) -> int:
    """Return the group size of weights of four bits, 0 for one group of all columns."""
    _check_one_of(weights, "type", ("int",), where)
    _check_one_of(weights, "num_bits", (4,), where)
    _check_one_of(weights, "strategy", ("group", "channel"), where)
    size = weights.get("group_size")
    return int(size) if weights["strategy"] == "group" and size is not None else 0


def _float_block(weights: Config, where: str) -> tuple[int, int] | None:
    """Return the block of weights of fp8, None for scales of rows or of a whole weight."""
    _check_one_of(weights, "type", ("float",), where)
    _check_one_of(weights, "num_bits", (8,), where)
    _check_one_of(weights, "strategy", ("block", "channel", "tensor"), where)
    if weights["strategy"] != "block":
        return None
    return _block(weights.get("block_structure"), f"{where}.weights.block_structure")


def _scale_counts(weight: Tensor, block: tuple[int, int] | None) -> tuple[int, ...]:
    """Return how many scales the weight may have."""
    rows, columns = weight.shape[-2:]
    matrices = weight.numel() // (rows * columns)
    if block is None:
        return 1, matrices, matrices * rows
    return (matrices * -(-rows // block[0]) * -(-columns // block[1]),)


def _find_quantization(config: Config) -> Config | None:
    """Return the quantization_config of a model, or of the text model in it."""
    for place in (config, config.get("text_config") or {}):
        found: Config | None = place.get("quantization_config") or place.get("compression_config")
        if found:
            return found
    return None


def _check_bits(quantization: Config, key: str) -> None:
    if quantization.get(key) != 4:
        raise ValueError(_unsupported(key, quantization.get(key), "4"))


def _check_one_of(weights: Config, key: str, allowed: tuple[object, ...], where: str) -> None:
    if weights.get(key) not in allowed:
        raise ValueError(_unsupported(f"{where}.weights.{key}", weights.get(key), ", ".join(map(str, allowed))))


def _group_size(quantization: Config) -> int:
    """Return columns of a group, 0 for all of them."""
    size = quantization.get("group_size", quantization.get("q_group_size"))
    if not isinstance(size, int) or (size != -1 and (size < 32 or size % 32)):
        raise ValueError(_unsupported("group_size", size, "-1 and multiples of 32"))
    return max(size, 0)


def _block(block: object, key: str) -> tuple[int, int]:
    if not isinstance(block, Sequence) or len(block) != 2 or block[0] < 1 or block[1] < 1 or block[1] % 128:
        raise ValueError(_unsupported(key, block, "[rows, columns] with columns a multiple of 128"))
    return int(block[0]), int(block[1])


def _unsupported(key: str, value: object, allowed: str) -> str:
    return f"quantization_config.{key} is {value!r}, which is not supported (only {allowed}); {_PLAIN_SOURCE}"


def _parts(tensors: Mapping[str, Tensor], name: str, suffixes: tuple[str, ...]) -> tuple[Tensor, ...]:
    for suffix in suffixes:
        if name + suffix not in tensors:
            raise ValueError(_missing(name, suffixes))
    return tuple(tensors[name + suffix] for suffix in suffixes)


def _missing(name: str, suffixes: tuple[str, ...]) -> str:
    return f"{name} is not stored as quantised; it must have {', '.join(name + s for s in suffixes)}"


def _combined(weights: Sequence[QuantizedWeight], combine: Any, dim: int) -> QuantizedWeight:
    _check_alike(weights, {tuple(w.shape) if dim == 0 else (*w.shape[:-2], w.shape[-1]) for w in weights})
    zeros = [w.zeros for w in weights if w.zeros is not None]
    return QuantizedWeight(
        weights[0].format,
        combine([w.codes for w in weights], dim),
        combine([w.scales for w in weights], dim),
        combine(zeros, dim) if zeros else None,
    )


def _check_alike(weights: Sequence[QuantizedWeight], shapes: set[Any]) -> None:
    formats = {w.format.name for w in weights}
    if len(formats) != 1 or len(shapes) != 1:
        distinct = sorted({tuple(w.shape) for w in weights})
        raise ValueError(
            f"weights of formats {', '.join(sorted(formats))} and shapes {[list(shape) for shape in distinct]} "
            "cannot be one weight"
        )
