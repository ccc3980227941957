"""What a model is made of, from its configuration and the headers of its weights.

The model is built without memory, on torch's meta device, and one short pass shows what its routers select and what its
attention keeps. So every architecture that transformers knows is described, not only those of a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ktcompile.graph.experts import describe
from ktcompile.models import config_fields
from ktcompile.models.crosscheck import differences
from ktcompile.models.source import ModelSource
from ktcompile.plan.architecture import Architecture, LayerCache, RoutedExperts
from ktcompile.quant import FORMATS
from ktcompile.quant.checkpoints import (
    AwqReader,
    CompressedTensorsReader,
    Fp8Reader,
    GptqReader,
    Mxfp4Reader,
    Reader,
    detect,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Tokens of the pass: fewer than any sliding window.
_TOKENS = 4
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FORMAT_OF_DTYPE = {f.storage: f.name for f in FORMATS.values() if f.storage is not None}
_QUANTIZATION = ("quantization_config", "compression_config")
# Modules whose input has the values of all heads one beside the other.
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")
_ATTENTION = re.compile(r"Attention$|Attn$")


def architecture(source: ModelSource) -> Architecture:
    """Return what a model is made of. ValueError: its configuration does not describe one.

    Where transformers cannot build the model, fields of the configuration are read in place of it, and a note says so.
    """
    notes = list(source.notes)
    raw = {key: value for key, value in source.config.items() if key not in (*_QUANTIZATION, "auto_map")}
    if isinstance(raw.get("text_config"), dict):
        raw["text_config"] = {k: v for k, v in raw["text_config"].items() if k not in _QUANTIZATION}
    dtype = _dtype(source)
    stored_format = _stored_format(source, dtype, notes)
    try:
        model = _build(raw, dtype, notes)
    except Exception as error:  # another library's code on a stranger's file: any failure means "not known"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        notes.append(f"transformers cannot build this model ({reason}): read off fields of the configuration")
        return config_fields.architecture(source, raw, dtype.itemsize, stored_format, tuple(notes))
    return _of_model(source, model, dtype, stored_format, notes)


def _of_model(
    source: ModelSource, model: PreTrainedModel, dtype: torch.dtype, stored_format: str, notes: list[str]
) -> Architecture:
    modules = {name: m for name, m in model.named_modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj")}
    reasons = {type(m): describe(m) for m in modules.values()}
    notes += [f"these experts are run by transformers' own code: {r}" for r in reasons.values() if isinstance(r, str)]
    text = model.config.get_text_config()
    top_k, cache = _pass(model, modules, notes)
    experts = tuple(_routed(name, m, top_k.get(name) or _top_k(text)) for name, m in modules.items())
    if not experts:
        notes.append("no layer has experts that ktcompile recognises: all weights count as dense")
    sizes = {name: t.numel() * _element_size(model, name, t) for name, t in _tensors(model)}
    routed = {f"{path}.{name}" for path, m in modules.items() for name in _expert_parameters(m)}
    tables = _tables(model)
    dense = {name: t for name, t in model.named_parameters() if name not in routed}
    read = [name for name in dense if name not in tables]
    notes += differences(source, model, stored_format)
    parameters = sum(p.numel() for p in model.parameters())
    return Architecture(
        name=source.name,
        model_type=str(source.config.get("model_type", text.model_type)),
        num_layers=len(cache) or int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        dtype_bytes=dtype.itemsize,
        parameters=parameters,
        dense_bytes=sum(size for name, size in sizes.items() if name not in routed),
        dense_read_bytes=sum(sizes[name] for name in read),
        dense_flops_per_token=2 * sum(dense[name].numel() for name in read if dense[name].dim() > 1),
        attention_flops=_attention_flops(model, cache),
        experts=experts,
        cache=cache,
        stored_format=stored_format,
        stored_bytes=_stored_bytes(source, parameters, sum(e.parameters for e in experts), dtype, stored_format),
        notes=tuple(dict.fromkeys(notes)),
    )


def _build(raw: dict[str, Any], dtype: torch.dtype, notes: list[str]) -> PreTrainedModel:
    """Return the language model on the meta device, in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = _config(raw)
    text = config.get_text_config()
    ways: list[tuple[Any, PreTrainedConfig]] = [(AutoModelForCausalLM, config)]
    ways += [(AutoModelForCausalLM, text), (AutoModelForImageTextToText, config)] if text is not config else []
    problem: ValueError | None = None
    for auto_class, part in ways:
        if type(part) not in auto_class._model_mapping:
            problem = problem or ValueError(f"it has no causal language model for {type(part).__name__}")
            continue
        with torch.device("meta"):
            model: Any = auto_class.from_config(part, dtype=dtype)
        if auto_class is AutoModelForImageTextToText:
            notes.append(f"{type(model).__name__} is no plain language model: its parts for images count as dense")
        result: PreTrainedModel = model.eval()
        return result
    assert problem is not None
    raise problem


def _config(raw: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration by its model_type, or by its class of models where others renamed that (Kimi K2)."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = _with_floats(raw)
    model_type = str(raw.get("model_type"))
    if model_type in CONFIG_MAPPING:
        known: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(raw))
        return known
    for name in raw.get("architectures") or ():
        config_class = getattr(getattr(transformers, name, None), "config_class", None)
        if config_class is not None:
            other: PreTrainedConfig = config_class.from_dict({k: v for k, v in raw.items() if k != "model_type"})
            return other
    raise ValueError(f"it has no model_type {model_type!r}")


def _with_floats(value: Any) -> Any:
    """Return JSON with the numbers that it cannot hold, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return (
            float(value["__float__"]) if set(value) == {"__float__"} else {k: _with_floats(v) for k, v in value.items()}
        )
    return [_with_floats(v) for v in value] if isinstance(value, list) else value


def _pass(
    model: PreTrainedModel, modules: dict[str, nn.Module], notes: list[str]
) -> tuple[dict[str, int], tuple[LayerCache, ...]]:
    """Return, from a pass over a few tokens, experts per token of each module, and what each layer keeps."""
    top_k: dict[str, int] = {}

    def stand_in(name: str) -> Any:
        def forward(hidden_states: Tensor, top_k_index: Tensor, *others: Any, **keywords: Any) -> Tensor:
            top_k[name] = int(top_k_index.shape[-1])
            return torch.empty_like(hidden_states)

        return forward

    for name, module in modules.items():
        module.forward = stand_in(name)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            kept = model(input_ids=tokens, use_cache=True).past_key_values
        return top_k, tuple(_layer_cache(layer) for layer in kept.layers)
    except Exception as error:  # another library's code on tensors without values
        what = f"{type(model).__name__} does not run without weights ({type(error).__name__})"
        text = model.config.get_text_config()
        notes.append(f"{what}: its cache is read off fields of the configuration")
        fields = {k: v for k, v in text.to_dict().items() if v is not None}
        return top_k, config_fields.cache(fields, next(model.parameters()).element_size())


def _layer_cache(layer: Any) -> LayerCache:
    """Return the sizes of one layer of transformers' cache that holds `_TOKENS` tokens of one sequence."""
    per_token = state = 0
    for name, value in vars(layer).items():
        for tensor in _values(value):
            if not tensor.is_floating_point():
                continue
            size = tensor.numel() * tensor.element_size()
            if name in ("keys", "values"):
                per_token += size // _TOKENS
            else:
                state += size
    window = vars(layer).get("sliding_window")
    # A new token is attended to with the ones that are kept: together they fill the window.
    return LayerCache(per_token, None if window is None else max(0, int(window) - 1), state)


def _values(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _values(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _values(inner)


def _routed(path: str, module: Any, top_k: int) -> RoutedExperts:
    down = module.down_proj.shape
    hidden, intermediate = (down[2], down[1]) if module.is_transposed else (down[1], down[2])
    number = re.search(r"\.(\d+)\.", path)
    layer = int(number[1]) if number else -1
    return RoutedExperts(
        layer, down[0], min(top_k, down[0]), hidden, intermediate, bool(module.has_gate), bool(module.has_bias)
    )


def _expert_parameters(module: Any) -> tuple[str, ...]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return (up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ()))


def _top_k(config: PreTrainedConfig) -> int:
    return config_fields.top_k(config.to_dict())


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _element_size(model: PreTrainedModel, name: str, tensor: Tensor) -> int:
    """Return bytes of an element when the model is loaded: some parts stay in fp32."""
    kept = model._keep_in_fp32_modules_strict or ()
    if any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in kept) and tensor.is_floating_point():
        return 4
    return tensor.element_size()


def _tables(model: PreTrainedModel) -> set[str]:
    """Return the parameters of which a token reads a row: embeddings that are not the head as well."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    own = None if head is None else head.weight
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is not own
    }


def _attention_flops(model: PreTrainedModel, cache: tuple[LayerCache, ...]) -> int:
    """Return operations of a query with one token that is kept, summed over the layers that keep all of them.

    Both products of a head have about the width of its values, which the output projection shows.
    """
    widths = []
    for module in model.modules():
        if _ATTENTION.search(type(module).__name__):
            outputs = [getattr(module, name, None) for name in _OUTPUT_PROJECTIONS]
            widths += [m.in_features for m in outputs if isinstance(m, nn.Linear)][:1]
    growing = sum(layer.window is None and layer.bytes_per_token > 0 for layer in cache)
    return 4 * growing * max(widths, default=0)


def _dtype(source: ModelSource) -> torch.dtype:
    """Return the dtype of what is not quantised: the configuration's, else that of most stored elements."""
    config = source.config
    inner = config.get("text_config") or {}
    named = next((c[k] for c in (inner, config) for k in ("dtype", "torch_dtype") if c.get(k)), None)
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found in _FORMAT_OF_DTYPE:
        return found
    elements: Counter[str] = Counter()
    for tensor in source.tensors or ():
        elements[tensor.dtype] += tensor.elements if tensor.dtype in _DTYPES else 0
    return _DTYPES[elements.most_common(1)[0][0]] if +elements else torch.bfloat16


def _stored_format(source: ModelSource, dtype: torch.dtype, notes: list[str]) -> str:
    """Return the weight format of the experts in the checkpoint."""
    try:
        reader = detect(source.config)
    except ValueError as error:
        notes.append(f"this checkpoint cannot be loaded: {error}")
        reader = None
    return _FORMAT_OF_DTYPE[dtype] if reader is None else _format_of_reader(reader, source.config)


def _format_of_reader(reader: Reader, config: dict[str, Any]) -> str:
    if isinstance(reader, Mxfp4Reader):
        return "mxfp4"
    if isinstance(reader, Fp8Reader):
        return "fp8" if reader.block else "fp8_channel"
    if isinstance(reader, CompressedTensorsReader) and not reader.group_sizes:
        return "fp8" if any(reader.blocks) else "fp8_channel"
    sizes = reader.group_sizes if isinstance(reader, CompressedTensorsReader) else (_group_size(reader),)
    group = next((g for g in (128, 64, 32) if sizes[0] % g == 0), 32)
    has_zeros = isinstance(reader, AwqReader) or (isinstance(reader, GptqReader) and not reader.symmetric)
    has_zeros = has_zeros or _is_asymmetric(config)
    return f"int4_g{group}{'_zp' if has_zeros else ''}"


def _is_asymmetric(config: dict[str, Any]) -> bool:
    """Return whether compressed-tensors has zero points."""
    inner = config.get("text_config") or {}
    places = [c.get(key) or {} for c in (config, inner) for key in _QUANTIZATION]
    groups = [group for place in places for group in place.get("config_groups", {}).values()]
    return any(not (group.get("weights") or {}).get("symmetric", True) for group in groups)


def _group_size(reader: Reader) -> int:
    assert isinstance(reader, (GptqReader, AwqReader))
    return reader.group_size


def _stored_bytes(source: ModelSource, parameters: int, routed: int, dtype: torch.dtype, stored_format: str) -> int:
    if source.tensors is not None:
        return sum(tensor.size for tensor in source.tensors)
    return round(routed * FORMATS[stored_format].bytes_per_weight) + (parameters - routed) * dtype.itemsize
