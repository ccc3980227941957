"""Models from files of packed weights, and to them.

A file has every tensor of a model but the plain weights of experts that are packed, and these packed. Its experts are
multiplied where they lie in the file's memory; plain tensors lie there too until they are written to.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktcompile import _native, collector
from ktcompile.graph.experts import ExpertsFacts, describe
from ktcompile.log import logger
from ktcompile.machine import machine
from ktcompile.models import hf_experts, streaming
from ktcompile.models.packed_cache import PackedCache
from ktcompile.models.packed_file import PackedFile, PackedFileError, PackedFileWriter, Payload, address_of, verify
from ktcompile.models.stored_model import reader_of
from ktcompile.models.tensor_files import DTYPES
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.linear import PackedLinear
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.weights import MappedLayer
from ktcompile.quant import FORMATS, full_name

if TYPE_CHECKING:
    import mmap

    from transformers import PreTrainedModel

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Experts of a larger part of the RAM than this are checked by `ktc pack --verify` alone: reading all of them would push
# out what is in use.
_CHECKED = 0.5


def load(cache: PackedCache, key: str, folder: Path, weight_format: str) -> PreTrainedModel | None:
    """Return the model that `store` wrote, as `streaming.load` returns it; None if there is none, or with a warning if
    it cannot be used.

    folder: of the checkpoint, of which no weights are read.
    """
    try:
        file = cache.open(key)
        if file is None:
            return None
        try:
            return _read(file, folder, weight_format)
        finally:
            file.close()
    except PackedFileError as error:
        logger.warning("the packed model %s is not used, and replaced: %s", cache.path(key), error)
    except OSError as error:
        logger.warning("the cache of packed models is not used: %s", error)
    return None


def store(
    cache: PackedCache,
    key: str,
    folder: Path,
    weight_format: str,
    model: PreTrainedModel,
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> bool:
    """Write a model of `streaming.load`, and return whether it was; else a warning says why not.

    folder, weight_format: what it was loaded from and in. track: passes layers on, as for a progress bar.
    """
    layers = {path: module for path, module in model.named_modules() if hf_experts.absent(module)}
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype)
    held = sum(hf_experts.packed(module).nbytes for module in layers.values())
    held += sum(tensor.nbytes for tensor in _own_tensors(model).values())
    try:
        with cache.writing(key, held) as writer:
            tensors, plain_end = _write_tensors(writer, model)
            experts = {path: _write_experts(writer, layers[path]) for path in track(list(layers))}
            header = {
                "model": str(folder.resolve()),
                "weight_format": full_name(weight_format),
                "dtype": _NAMES[dtype],
                "tensors": tensors,
                "plain_end": plain_end,
                "experts": experts,
            }
            writer.finish(header)
        return True
    except OSError as error:
        logger.warning("the packed model is not kept for the next start: %s", error)
        return False


def payloads(header: dict[str, Any]) -> Iterator[tuple[str, Payload]]:
    """Yield all payloads of a file, each with the name of what it is. The files of kept steps have linear layers."""
    for record in header["tensors"]:
        yield record["names"][0], Payload(*record["payload"])
    for path, record in (*header["experts"].items(), *header.get("linear", {}).items()):
        for payload in record["memory"]:
            yield path, Payload(*payload)


def open_parts(
    file: PackedFile, names: Iterable[str], experts: dict[str, ExpertsSpec]
) -> tuple[dict[str, torch.Tensor], dict[str, PackedExperts]]:
    """Return some of the tensors that `store` wrote, and the experts of modules, by their paths, without a model.

    experts: what is known of those of each module. Nothing else of the file is read. PackedFileError: something is not
    there, or damaged.
    """
    header, memory, wanted = file.header, file.map(), set(names)
    records = [record for record in header["tensors"] if wanted.intersection(record["names"])]
    missing = wanted.difference(name for record in records for name in record["names"])
    missing.update(path for path in experts if path not in header["experts"])
    if missing:
        raise PackedFileError(f"it does not have {min(missing)}")
    known = {path: header["experts"][path] for path in experts}
    _verify(file, memory, {"tensors": records, "experts": known, "plain_end": header["plain_end"]})
    private = file.map_private(header["plain_end"])
    tensors = {name: tensor for record in records for name, tensor in tensors_of(record, private).items()}
    begin, owner = address_of(memory)
    layers = {}
    for path, record in known.items():
        layers[path] = _experts(record, begin, owner, [], experts[path], path)
        layers[path].first_call = None
    return {name: tensors[name] for name in wanted}, layers


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers but those that are packed, by name; what is shared has several."""
    packed = {f"{path}.{name}" for path, module in model.named_modules() for name in hf_experts.absent(module)}
    every = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in every if name not in packed}


def _write_tensors(writer: PackedFileWriter, model: nn.Module) -> tuple[list[dict[str, Any]], int]:
    records: dict[int, dict[str, Any]] = {}
    for name, tensor in _own_tensors(model).items():
        if id(tensor) in records:
            records[id(tensor)]["names"].append(name)
            continue
        records[id(tensor)] = write_tensor(writer, name, tensor)
    return list(records.values()), writer.size


def write_tensor(writer: PackedFileWriter, name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Write a tensor, and return what a header has of it. OSError."""
    values: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    payload = writer.add(memoryview(values))
    return {
        "names": [name],
        "dtype": _NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "payload": payload.record(),
    }


def _write_experts(writer: PackedFileWriter, module: nn.Module) -> dict[str, Any]:
    packed = hf_experts.packed(module)
    return write_layer(writer, packed, (packed.num_experts, packed.hidden_size, packed.intermediate_size))


def write_layer(
    writer: PackedFileWriter, packed: PackedExperts | PackedLinear, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Write a packed layer, and return what a header has of it. shape: as of `MappedLayer`. OSError."""
    return {
        "shape": list(shape),
        "format": packed.format.name,
        "scale": packed.native.format.scale.name,
        "memory": [writer.add(_bytes_at(*place)).record() for place in packed.native.memory],
    }


def _bytes_at(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address) if size else b"").cast("B")


def _read(file: PackedFile, folder: Path, weight_format: str) -> PreTrainedModel:
    header, memory = file.header, file.map()
    # Beside seconds of imports.
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(_verify, file, memory, header)
        model = _without_weights(folder, DTYPES[header["dtype"]])
        verified.result()
    if reader_of(folder) is None:
        hf_experts.configure(model, weight_format)
    facts = {path: _facts(model.get_submodule(path)) for path in header["experts"]}
    packed = {f"{path}.{name}" for path, known in facts.items() for name in known.parameters[:2]}
    _give_tensors(model, header, packed, file.map_private(header["plain_end"]))
    begin, owner = address_of(memory)
    kinds: set[Any] = set()
    for path, record in header["experts"].items():
        module = model.get_submodule(path)
        biases = [None if n is None else module.get_parameter(n).detach() for n in facts[path].parameters[2:]]
        spec = replace(facts[path].spec, transposed=False, weight_format=weight_format)
        experts = _experts(record, begin, owner, biases, spec, path)
        # The check of first calls is of kernels: what they read was checked when it was packed, and has checksums.
        kind = spec, experts.format.name, record["scale"], tuple(record["shape"])
        if kind in kinds:
            experts.first_call = None
        kinds.add(kind)
        hf_experts.adopt(module, experts)
    model.generation_config = streaming.generation_config(folder) or model.generation_config
    model.train(False)
    return model


def _without_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    with collector.paused():
        from transformers import AutoModelForCausalLM

        config = streaming.without_quantization(folder)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, experts_implementation=hf_experts.NAME
            )
    return model


def _give_tensors(model: nn.Module, header: dict[str, Any], packed: set[str], memory: mmap.mmap) -> None:
    """Put tensors that lie in `memory` in the place of the model's, but for those that are packed. PackedFileError:
    some are missing."""
    given: dict[str, torch.Tensor] = {}
    for record in header["tensors"]:
        given |= tensors_of(record, memory)
    parameters: dict[int, nn.Parameter] = {}  # what is shared is one object
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, old in module._parameters.items():
            if old is None or prefix + name in packed:
                continue
            new = _fitting(given, prefix + name, old)
            parameter = nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[name] = parameters.setdefault(id(new), parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fitting(given, prefix + name, buffer)


def tensors_of(record: dict[str, Any], memory: mmap.mmap) -> dict[str, torch.Tensor]:
    """Return the tensor of a record, which lies in `memory`, by each of its names."""
    offset, size, _ = record["payload"]
    dtype, shape = DTYPES[record["dtype"]], record["shape"]
    tensor = torch.empty(shape, dtype=dtype)
    if size:
        tensor = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(dtype).view(shape)
    return dict.fromkeys(record["names"], tensor)


def _verify(file: PackedFile, memory: mmap.mmap, header: dict[str, Any]) -> None:
    """Read the payloads of a header, of a file of which that is much of the RAM only plain tensors. PackedFileError."""
    large = file.size > _CHECKED * machine().memory_bytes
    verify(memory, ((n, p) for n, p in payloads(header) if not large or p.offset < header["plain_end"]))


def _fitting(given: dict[str, torch.Tensor], name: str, old: torch.Tensor) -> torch.Tensor:
    if name not in given or given[name].shape != old.shape:
        raise PackedFileError(f"it does not have {name} {list(old.shape)}")
    return given[name]


def _facts(module: nn.Module) -> ExpertsFacts:
    facts = describe(module)
    if isinstance(facts, str):
        raise PackedFileError(f"its experts are not those of the model: {facts}")
    return facts


def _experts(
    record: dict[str, Any],
    begin: int,
    owner: object,
    biases: Sequence[torch.Tensor | None],
    spec: ExpertsSpec,
    path: str,
) -> PackedExperts:
    """Return experts in the memory of a file, which begins at an address. PackedFileError."""
    try:
        return PackedExperts.mapped(mapped_layer(record, begin, owner), biases, spec, path)
    except ValueError as error:
        raise PackedFileError(f"{path}: {error}") from error


def mapped_layer(record: dict[str, Any], begin: int, owner: object) -> MappedLayer:
    """Return a packed layer in the memory of a file, which begins at an address."""
    stored = FORMATS[record["format"]]
    scale = getattr(_native.ScaleType, record["scale"])
    layout = getattr(_native.Layout, stored.layout)
    native = _native.Format(layout, stored.group_size or 0, scale, stored.has_zero_points)
    places = [(begin + offset, size) if size else (0, 0) for offset, size, _ in record["memory"]]
    return MappedLayer(tuple(record["shape"]), stored, native, places, owner)
