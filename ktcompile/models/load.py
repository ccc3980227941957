"""Models ready to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ktcompile.config import DeviceOptions
from ktcompile.models import checkpoint, hf_experts, packed_model, placed, streaming, tiny_model
from ktcompile.models.packed_cache import AUTO, cache_for, key_of
from ktcompile.quant import check_format
from ktcompile.runtime.placing import placer_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Track = Callable[[list[Any]], Iterable[Any]]


def load(
    model: str | Path | None = None,
    *,
    weight_format: str = "auto",
    packed_cache: str | Path | None = AUTO,
    track: Track = iter,
    **device_options: Any,
) -> PreTrainedModel:
    """Return a causal language model whose experts are packed, ready to call, in evaluation mode.

    model: a directory or a hub id; None: the small model of the package. weight_format: of the experts, as for
    `ktcompile.ops.pack_experts`; those of a quantised checkpoint stay as they are stored. packed_cache: a folder for
    packed models, from which the next load of the same one takes seconds; None or "off": none; "auto": that of
    KTCOMPILE_PACKED_CACHE, or for models of 256 MiB and more ktcompile/packed in the user's folder of caches. What is
    wrong with it is a warning. track: passes layers on while they are packed, as for a progress bar. device_options:
    fields of `ktcompile.config.DeviceOptions`, as device, device_expert_fraction and device_memory.
    Experts that the kernels cannot run are left to transformers, with a warning. FileNotFoundError: there is no such
    model, or files of it are missing. ValueError: a file is damaged, an option is unknown or cannot be used, or the
    model has no experts for a format or a device that was asked for.
    """
    options = DeviceOptions.of_keywords(device_options, "ktcompile.load")
    check_format(weight_format)
    placer = placer_for(options)
    name = locate(model)
    result = _read(name, weight_format, packed_cache, track)
    left = _configured(result, name, weight_format)
    for module in track(left) if left else ():
        hf_experts.take(module)
    if placer is not None:
        placed.attach(result, placer)
    return result


def load_for_compiler(
    model: str | Path | None = None,
    *,
    weight_format: str = "auto",
    packed_cache: str | Path | None = AUTO,
    track: Track = iter,
) -> PreTrainedModel:
    """Return a model for the backend, which packs what is not packed yet: all but most experts.

    Arguments and errors are those of `load`.
    """
    check_format(weight_format)
    name = locate(model)
    result = _read(name, weight_format, packed_cache, track)
    _configured(result, name, weight_format)
    return result


def locate(model: str | Path | None) -> str:
    """Return what names a model for transformers. Errors as for `ktcompile.models.checkpoint.locate`."""
    return checkpoint.locate(model or tiny_model.path())


def folder_of(name: str) -> Path:
    """Return the folder of a model that `locate` named, downloaded if it is of the hub. Errors as for
    `ktcompile.models.checkpoint.fetch`."""
    return Path(name) if Path(name).is_dir() else checkpoint.fetch(name)


def _read(name: str, weight_format: str, cache_option: str | Path | None, track: Track) -> PreTrainedModel:
    folder = folder_of(name)
    cache = cache_for(cache_option, folder)
    if cache is None:
        return streaming.load(folder, weight_format, track)
    key = key_of(folder, weight_format)
    model = packed_model.load(cache, key, folder, weight_format)
    if model is None:
        model = streaming.load(folder, weight_format, track)
        packed_model.store(cache, key, folder, weight_format, model)
    return model


def _configured(model: PreTrainedModel, name: str, weight_format: str) -> list[nn.Module]:
    """Return the modules whose experts are to be packed."""
    modules = hf_experts.configure(model, weight_format)
    packed = any(hf_experts.is_packed(module) for module in model.modules())
    if not modules and not packed and weight_format != "auto":
        raise ValueError(f"{name} has no experts that could be stored in {weight_format}")
    return modules
