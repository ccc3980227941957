"""Models from checkpoints, a layer of experts at a time: never more than what is packed is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktcompile.graph.experts import ExpertsFacts, describe
from ktcompile.log import warn_once
from ktcompile.models import hf_experts
from ktcompile.models.expert_weights import ExpertsParameter, Part, UnknownLayoutError, listed
from ktcompile.models.model_names import ModelNames
from ktcompile.models.stored_model import StoredModel
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.weights import ExpertsWeight
from ktcompile.quant import check_format, full_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load(
    folder: str | Path, weight_format: str = "auto", track: Callable[[list[Layer]], Iterable[Layer]] = iter
) -> PreTrainedModel:
    """Return the causal language model of a checkpoint, on the CPU, with packed experts (`hf_experts.adopt`).

    Plain experts are read and packed one by one. Those in fp8, mxfp4, and GPTQ, AWQ and compressed-tensors of four bits
    (what `ktcompile.quant.checkpoints.detect` knows) are packed as they are stored, a layer at a time. All other
    weights are plain in the model: quantised ones are dequantised to the dtype of the model, which is its config's;
    the kernels for linear layers do not run them yet. Experts that the kernels cannot run are plain, too, and so are
    those of which it is not known how transformers converts them.
    Beyond the model itself, memory holds the experts that threads pack; of quantised ones the codes of one layer, a
    byte each.

    weight_format: as for `ktcompile.ops.pack_experts`; quantised experts must be in it. track: passes the layers on
    while their experts are packed, as for a progress bar. FileNotFoundError: files are missing. ValueError: they are
    damaged, tensors are missing or do not fit, or are in a format that the kernels do not have; file and tensor are
    named.
    """
    folder = Path(folder).expanduser()
    check_format(weight_format)
    source = StoredModel.open(folder)
    config = without_quantization(folder)
    names = ModelNames(config, _dtype(config, source))
    layers, stored = _divide(source, names)
    _check_wanted_format(source, layers, weight_format)
    model = _load_plain(source, names, layers, stored)
    if source.reader is None:
        hf_experts.configure(model, weight_format)
    for layer in track(layers):
        experts = model.get_submodule(layer.path)
        hf_experts.adopt(experts, layer.pack(source, names, experts, weight_format))
    return model


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one layer: path: of their module. gate_up, down: of which stored weights they are made."""

    path: str
    facts: ExpertsFacts
    gate_up: ExpertsParameter
    down: ExpertsParameter

    @property
    def quantized(self) -> bool:
        return self.gate_up.parts[0].weight is not None

    def pack(self, source: StoredModel, names: ModelNames, module: nn.Module, weight_format: str) -> PackedExperts:
        """Return the packed experts. module: has their biases, and the shapes and dtypes that they must have."""
        weights = [self._weight(parameter, source, names, module) for parameter in (self.gate_up, self.down)]
        biases = [None if n is None else module.get_parameter(n).detach() for n in self.facts.parameters[2:]]
        spec = replace(self.facts.spec, transposed=False, weight_format=weight_format)
        try:
            return PackedExperts(weights[0], weights[1], biases[0], biases[1], spec, self.path)
        except ValueError as error:
            raise ValueError(f"{source.folder}: {self.path}: {error}") from error

    def _weight(
        self, parameter: ExpertsParameter, source: StoredModel, names: ModelNames, module: nn.Module
    ) -> ExpertsWeight:
        transposed = self.facts.spec.transposed
        if self.quantized:
            return parameter.quantized(source, names, transposed)
        dtype = module.get_parameter(parameter.name.rpartition(".")[2]).dtype
        return parameter.plain(source, names, transposed, dtype)


def _divide(source: StoredModel, names: ModelNames) -> tuple[list[Layer], dict[str, str | None]]:
    """Return the layers whose experts can be packed from what is stored, and the stored parameters that are not
    theirs, as from `StoredModel.parameters`."""
    from transformers.core_model_loading import dot_natural_key

    stored = source.parameters()
    found: dict[str, list[Part]] = {}
    for parameter in sorted(stored, key=dot_natural_key):
        name, pattern = names.find(parameter)
        found.setdefault(name, []).append(Part(parameter, stored[parameter], pattern))
    layers = []
    for path, module in names.model.named_modules():
        if not hasattr(module, "has_gate"):  # set by transformers' decorator of experts classes
            continue
        facts = describe(module)
        layer = None if isinstance(facts, str) else _layer(path, facts, found, source, names)
        if layer is not None:
            layers.append(layer)
    for layer in layers:
        for part in (*layer.gate_up.parts, *layer.down.parts):
            del stored[part.name]
    return layers, stored


def _layer(
    path: str, facts: ExpertsFacts, found: dict[str, list[Part]], source: StoredModel, names: ModelNames
) -> Layer | None:
    """Return a layer with all its parts; None if they are left to transformers. ValueError: some are missing."""
    both = [f"{path}.{name}" for name in facts.parameters[:2]]
    parts = [found.get(name, []) for name in both]
    if any(part.weight is not None for part in (*parts[0], *parts[1])):
        _check_all_quantized(source, both, parts)
    elif not all(parts):
        return None  # transformers says what is missing
    gate_up, down = (ExpertsParameter(name, tuple(some)) for name, some in zip(both, parts, strict=True))
    try:
        gate_up.check(source, names)
        down.check(source, names)
    except UnknownLayoutError as reason:
        kind = type(names.model.get_submodule(path)).__name__
        warn_once(f"{kind}: experts are read whole before they are packed, which takes more memory: {reason}")
        return None
    return Layer(path, facts, gate_up, down)


def _check_all_quantized(source: StoredModel, names: list[str], found: list[list[Part]]) -> None:
    """ValueError: weights are missing, or not quantised as others of the layer are."""
    for name, parts in zip(names, found, strict=True):
        if not parts:
            raise ValueError(f"{source.folder} lacks {name}, quantised as the other weights of these experts are")
        for part in parts:
            if part.weight is None:
                source.check_plain(part.name)
                where = f"{source.shards.file(part.name)}: {part.name}"
                raise ValueError(f"{where} is not quantised, but other experts of its layer are")


def _check_wanted_format(source: StoredModel, layers: list[Layer], weight_format: str) -> None:
    quantized = next((layer.down.parts[0].weight for layer in layers if layer.quantized), None)
    if weight_format == "auto" or quantized is None:
        return
    stored = source.read(quantized).format.name
    if full_name(weight_format) != stored:
        raise ValueError(
            f"weight_format is {weight_format!r}, but the experts of {source.folder} are quantised as {stored}; leave "
            'it at "auto", or use the checkpoint that is not quantised'
        )


def _load_plain(
    source: StoredModel, names: ModelNames, layers: list[Layer], stored: dict[str, str | None]
) -> PreTrainedModel:
    """Return the model with all its weights but those of `layers`, which are NaN and take no memory."""
    _check_dtypes(source, names, stored)
    state: dict[str, Any] = {n: source.lazy(n, weight, names.dtype) for n, weight in stored.items()}
    for name in (p.name for layer in layers for p in (layer.gate_up, layer.down)):
        wanted = names.parameters[name]
        state[name] = torch.full((), torch.nan, dtype=wanted.dtype).expand(wanted.shape)
    model_class: Any = type(names.model)
    try:
        model, report = model_class.from_pretrained(
            None,
            config=names.config,
            state_dict=state,
            dtype=names.dtype,
            experts_implementation=hf_experts.NAME,
            ignore_mismatched_sizes=True,  # they are reported by name below
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise ValueError(f"transformers cannot load {source.folder}: {error}") from error
    _check_report(report, source, names, stored)
    model.config.name_or_path = str(source.folder)
    model.generation_config = generation_config(source.folder) or model.generation_config
    result: PreTrainedModel = model
    return result


def _check_dtypes(source: StoredModel, names: ModelNames, stored: dict[str, str | None]) -> None:
    """ValueError: a plain tensor has no fractions, but what it stands for in the model has."""
    for part in (name for name, weight in stored.items() if weight is None):
        name, _ = names.find(part)
        dtype = source.shards.dtype(part)
        if name in names.parameters and names.parameters[name].is_floating_point() and not dtype.is_floating_point:
            raise ValueError(f"{source.shards.file(part)}: {part} is {dtype}; {name} has a fraction")


def _check_report(report: dict[str, Any], source: StoredModel, names: ModelNames, stored: Iterable[str]) -> None:
    """ValueError: weights were missing, or had another shape than those of the model."""
    if report["missing_keys"]:
        raise ValueError(f"{source.folder} lacks {listed(sorted(report['missing_keys']))}")
    for name, got, wanted in sorted(report["mismatched_keys"]):
        part = next((part for part in stored if names.find(part)[0] == name), name)
        where = source.shards.file(part.removesuffix(".weight"))
        raise ValueError(f"{where}: {part} gives {name} {list(got)}; it must be {list(wanted)}")


def without_quantization(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model as if it were not quantised."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def _dtype(config: PreTrainedConfig, source: StoredModel) -> torch.dtype:
    """Return the dtype of what is not quantised: that of the configuration, or else of the first weights."""
    dtype = config.get_text_config().dtype or config.dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    return (None if source.reader else source.first_float()) or torch.bfloat16


def generation_config(folder: Path) -> Any:
    """Return how a model generates by the file beside it, None if there is none."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)
