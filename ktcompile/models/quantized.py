"""Models from checkpoints that are quantised: experts stay as they are stored, the rest becomes plain tensors."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ktcompile.graph.experts import ExpertsFacts, describe
from ktcompile.models import hf_experts
from ktcompile.models.checkpoint import Shards
from ktcompile.ops.experts import PackedExperts
from ktcompile.quant import QuantizedWeight, check_format, full_name
from ktcompile.quant.checkpoints import Reader, detect, parameters, place_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Weights that are dequantised at once; fp32 takes four bytes each.
_SLICE = 1 << 22
# Names that an error lists.
_SHOWN = 5


def reader_of(model: str | Path) -> Reader | None:
    """Return what reads the weights of the model in a directory; None if they are not quantised, or if `model` is not
    a directory. ValueError: they are quantised in a way that is not supported."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        return detect(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load(
    folder: str | Path, weight_format: str = "auto", track: Callable[[list[Layer]], Iterable[Layer]] = iter
) -> PreTrainedModel:
    """Return the causal language model of a quantised checkpoint, on the CPU, that runs the experts in their format.

    fp8, mxfp4, and GPTQ, AWQ and compressed-tensors of four bits are read: what `ktcompile.quant.checkpoints.detect`
    knows. The experts' codes are packed as they are stored, for the experts implementation "kt"
    (`hf_experts.adopt`). Other quantised weights, those of attention, shared experts and routers, are dequantised to
    the dtype of the model, which is its config's; the kernels for linear layers do not run them yet. Layers of
    experts that were left out of quantisation, and those that the kernels cannot run, are plain, too.
    Beyond the model itself, memory holds the codes of one layer's experts, a byte each.

    weight_format: "auto", or the format that the experts must be in. track: passes the layers on while their experts
    are packed, as for a progress bar. FileNotFoundError: files are missing. ValueError: they are damaged, tensors are
    missing or do not fit, or are in a format that the kernels do not have; file and tensor are named.
    """
    folder = Path(folder).expanduser()
    check_format(weight_format)
    reader = reader_of(folder)
    if reader is None:
        raise ValueError(f"{folder} holds no quantised model; load it with transformers")
    source = _Source(folder, Shards(folder), reader)
    names = _ModelNames(_without_quantization(folder))
    layers, stored = _divide(source, names)
    _check_wanted_format(source, layers, weight_format)
    model = _load_plain(source, names, layers, stored)
    for layer in track(layers):
        experts = model.get_submodule(layer.path)
        hf_experts.adopt(experts, layer.pack(source, names, experts, weight_format))
    return model


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one layer: path: of their module. gate_up, down: of which stored weights they are made."""

    path: str
    facts: ExpertsFacts
    gate_up: _Parameter
    down: _Parameter

    def pack(self, source: _Source, names: _ModelNames, module: nn.Module, weight_format: str) -> PackedExperts:
        """Return the packed experts. module: has their biases, and the shapes that they must have."""
        transposed = self.facts.spec.transposed
        weights = [p.read(source, names, transposed) for p in (self.gate_up, self.down)]
        biases = [None if name is None else getattr(module, name).detach() for name in self.facts.parameters[2:]]
        spec = replace(self.facts.spec, transposed=False, weight_format=weight_format)
        try:
            return PackedExperts(weights[0], weights[1], biases[0], biases[1], spec)
        except ValueError as error:
            raise ValueError(f"{source.folder}: {self.path}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint on disk."""

    folder: Path
    shards: Shards
    reader: Reader

    def read(self, weight: str) -> QuantizedWeight:
        """Return a weight as it is stored. ValueError: it cannot be read; names its file."""
        try:
            return self.reader.read(self.shards, weight)
        except ValueError as error:
            raise ValueError(f"{self.shards.file(weight)}: {error}") from error

    def dequantized(self, weight: str, dtype: torch.dtype) -> Tensor:
        """Return a weight as a plain tensor. Errors as for `read`."""
        quantized = self.read(weight)
        rows, columns = quantized.shape[:-1].numel(), quantized.shape[-1]
        flat = [None if t is None else t.reshape(rows, -1) for t in (quantized.scales, quantized.zeros)]
        codes, (scales, zeros) = quantized.codes.reshape(rows, columns), flat
        assert scales is not None
        result = torch.empty(rows, columns, dtype=dtype)
        step = max(1, _SLICE // columns)
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            some = QuantizedWeight(quantized.format, codes[part], scales[part], None if zeros is None else zeros[part])
            result[part] = some.dequantize()
        return result.view(quantized.shape)

    def plain(self, name: str) -> Tensor:
        """Return a tensor that is not quantised. ValueError: it holds codes of which the scales are missing."""
        tensor = self.shards[name]
        if tensor.element_size() == 1 and tensor.dtype != torch.bool:
            self.read(name.removesuffix(".weight"))  # says what is missing
            raise ValueError(f"{self.shards.file(name)}: {name} is {tensor.dtype} without scales")
        return tensor


class _ModelNames:
    """The parameters of a model, on the meta device, and their names in checkpoints, as transformers knows them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.config = config
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=_dtype(config)
            )
        self.parameters: dict[str, Tensor] = self.model.state_dict()
        transforms: list[Any] = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def find(self, stored: str) -> tuple[str, str | None]:
        """Return the model's name of a stored parameter and, if it is a part of that, the pattern of such parts."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(stored, self._renamings, self._converters, prefix, self.parameters)
        if name not in self.parameters and stored in self.parameters:
            return stored, None
        return name, pattern

    def converter(self, pattern: str) -> Any:
        """Return a converter of the parts that match `pattern` and others into a parameter."""
        return copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))


@dataclass(frozen=True, slots=True)
class _Part:
    """A stored parameter that goes into one of the model. weight: its name for the reader. pattern: see `find`."""

    name: str
    weight: str
    pattern: str | None


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of the model for all experts, and the stored ones of which it is made."""

    name: str
    parts: tuple[_Part, ...]

    def read(self, source: _Source, names: _ModelNames, transposed: bool) -> QuantizedWeight:
        """Return the weight, [E, out, in]. transposed: the parameter itself is [E, in, out]."""
        wanted = names.parameters[self.name]
        shape = wanted.mT.shape if transposed else wanted.shape
        weights = [source.read(part.weight) for part in self.parts]
        self._check_alike(weights, source)
        if self.parts[0].pattern is None:
            result, *others = weights
            if others:
                raise ValueError(f"{self._where(source)} stands for {self.name}, as other tensors do")
        else:
            places = self._places([w.shape for w in weights], names, shape, source)
            try:
                result = place_rows(weights, places, (shape[0], shape[1]))
            except ValueError as error:
                raise ValueError(f"{self._where(source)}: {error}") from error
        if result.shape != shape:
            raise ValueError(f"{self._where(source)} gives {self.name} {list(result.shape)}; it must be {list(shape)}")
        return result

    def _places(
        self, shapes: Sequence[torch.Size], names: _ModelNames, wanted: torch.Size, source: _Source
    ) -> list[Tensor]:
        """Return where the rows of each part go, counted over all experts.

        transformers' own conversion is run on the numbers of the rows in place of the weights.
        """
        ends = list(itertools.accumulate(shape[:-1].numel() for shape in shapes))
        pattern = self.parts[0].pattern
        assert pattern is not None
        converter = names.converter(pattern)
        for part, shape, end in zip(self.parts, shapes, ends, strict=True):
            rows = torch.arange(end - shape[:-1].numel(), end).view(*shape[:-1], 1)
            converter.add_tensor(self.name, part.name, part.pattern, rows)
        try:
            order = converter.convert(self.name, model=names.model, config=names.config)[self.name]
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self._where(source)}: the weights of experts do not fit together: {error}") from error
        if order.shape != (wanted[0], wanted[1], 1) or not order.numel() == ends[-1] == order.unique().numel():
            distinct = [list(shape) for shape in sorted(set(shapes))]
            raise ValueError(
                f"{self._where(source)}: {len(shapes)} weights of {distinct} do not make {self.name} {list(wanted)}"
            )
        places = torch.empty(ends[-1], dtype=torch.int64)
        places[order.flatten()] = torch.arange(ends[-1])
        return list(torch.split(places, [shape[:-1].numel() for shape in shapes]))

    def _check_alike(self, weights: list[QuantizedWeight], source: _Source) -> None:
        """ValueError: an expert's weight is of another shape or format than those of most."""
        for pattern in {part.pattern for part in self.parts}:
            same = [(p, w) for p, w in zip(self.parts, weights, strict=True) if p.pattern == pattern]
            kinds = [f"{list(w.shape)} in {w.format.name}" for _, w in same]
            usual, _ = Counter(kinds).most_common(1)[0]
            for (part, _), kind in zip(same, kinds, strict=True):
                if kind != usual:
                    where = source.shards.file(part.weight)
                    raise ValueError(f"{where}: {part.name} is {kind}; that of other experts is {usual}")

    def _where(self, source: _Source) -> str:
        return f"{source.shards.file(self.parts[0].weight)}: {self.parts[0].name}"


def _divide(source: _Source, names: _ModelNames) -> tuple[list[Layer], dict[str, str | None]]:
    """Return the layers whose experts are quantised, and the stored parameters that are not theirs as from
    `quant.checkpoints.parameters`."""
    from transformers.core_model_loading import dot_natural_key

    stored = parameters(source.reader, source.shards)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for parameter in sorted(stored, key=dot_natural_key):
        name, pattern = names.find(parameter)
        found.setdefault(name, []).append((parameter, pattern))
    layers = []
    for path, module in names.model.named_modules():
        if not hasattr(module, "has_gate"):  # set by transformers' decorator of experts classes
            continue
        facts = describe(module)
        if isinstance(facts, str):
            continue
        both = [f"{path}.{name}" for name in facts.parameters[:2]]
        if not any(stored[part] for name in both for part, _ in found.get(name, ())):
            continue
        gate_up, down = (_whole(name, found.get(name, []), stored, source, names) for name in both)
        layers.append(Layer(path, facts, gate_up, down))
    for layer in layers:
        for part in (*layer.gate_up.parts, *layer.down.parts):
            del stored[part.name]
    return layers, stored


def _whole(
    name: str, found: list[tuple[str, str | None]], stored: dict[str, str | None], source: _Source, names: _ModelNames
) -> _Parameter:
    """Return a parameter of experts with all its parts. ValueError: some are missing, or not quantised."""
    if not found:
        raise ValueError(f"{source.folder} lacks {name}, quantised as the other weights of these experts are")
    parts = []
    for part, pattern in found:
        weight = stored[part]
        if weight is None:
            source.plain(part)
            raise ValueError(f"{source.shards.file(part)}: {part} is not quantised, but other experts of its layer are")
        parts.append(_Part(part, weight, pattern))
    _check_experts(name, parts, source, names)
    return _Parameter(name, tuple(parts))


def _check_experts(name: str, parts: list[_Part], source: _Source, names: _ModelNames) -> None:
    """ValueError: an expert's part is missing."""
    pattern = parts[0].pattern
    if pattern is None:
        return
    count = names.parameters[name].shape[0]
    for each in names.converter(pattern).source_patterns:
        present = {part.name for part in parts if part.pattern == each}
        if "*" not in each or not present:
            continue
        first = re.fullmatch(r"(.*\.)\d+(\..*)", min(present))
        if first is None:
            continue
        missing = [n for n in (f"{first[1]}{e}{first[2]}" for e in range(count)) if n not in present]
        if missing:
            raise ValueError(f"{source.folder} lacks {_listed(missing)}; other experts of the layer are quantised")


def _check_wanted_format(source: _Source, layers: list[Layer], weight_format: str) -> None:
    if weight_format == "auto" or not layers:
        return
    stored = source.read(layers[0].down.parts[0].weight).format.name
    if full_name(weight_format) != stored:
        raise ValueError(
            f"weight_format is {weight_format!r}, but the experts of {source.folder} are quantised as {stored}; leave "
            'it at "auto", or use the checkpoint that is not quantised'
        )


def _load_plain(
    source: _Source, names: _ModelNames, layers: list[Layer], stored: dict[str, str | None]
) -> PreTrainedModel:
    """Return the model with all its weights but those of `layers`, which are NaN and take no memory."""
    dtype = _dtype(names.config)
    state: dict[str, Any] = {}
    for parameter, weight in stored.items():
        read = partial(source.dequantized, weight, dtype) if weight else partial(source.plain, parameter)
        state[parameter] = _Lazy(read)
    for name in (p.name for layer in layers for p in (layer.gate_up, layer.down)):
        state[name] = torch.full((), torch.nan, dtype=dtype).expand(names.parameters[name].shape)
    model_class: Any = type(names.model)
    try:
        model, report = model_class.from_pretrained(
            None,
            config=names.config,
            state_dict=state,
            dtype=dtype,
            experts_implementation=hf_experts.NAME,
            ignore_mismatched_sizes=True,  # they are reported by name below
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise ValueError(f"transformers cannot load {source.folder}: {error}") from error
    _check_report(report, source, names, stored)
    model.generation_config = _generation_config(source.folder) or model.generation_config
    result: PreTrainedModel = model
    return result


class _Lazy:
    """Stands for a tensor until transformers takes a slice of it, as of a file."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]


def _check_report(report: dict[str, Any], source: _Source, names: _ModelNames, stored: Iterable[str]) -> None:
    """ValueError: weights were missing, or had another shape than those of the model."""
    if report["missing_keys"]:
        raise ValueError(f"{source.folder} lacks {_listed(sorted(report['missing_keys']))}")
    for name, got, wanted in sorted(report["mismatched_keys"]):
        part = next((part for part in stored if names.find(part)[0] == name), name)
        where = source.shards.file(part.removesuffix(".weight"))
        raise ValueError(f"{where}: {part} gives {name} {list(got)}; it must be {list(wanted)}")


def _without_quantization(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model as if it were not quantised."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of what is not quantised."""
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)


def _listed(names: Sequence[str]) -> str:
    others = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + others
