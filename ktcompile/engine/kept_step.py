"""The step of an engine on disk, so that its next start neither imports, builds nor traces the model.

What runs a step is a graph of native programs, the packed linear layers, and what a packed model has anyway: experts
and the tensors that stay plain. The graph and the linear layers are kept in a file beside the packed model's, with the
logits of an example, which every start computes again: those of other kernels may be off by their rounding, those of
the same ones by nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

import ktcompile
from ktcompile.engine.inputs import StepInputs
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.step_graph import ROUNDING, FromStep, StepGraph
from ktcompile.engine.summary import ModelSummary
from ktcompile.kv.layout import LayerKV
from ktcompile.log import logger
from ktcompile.machine import machine
from ktcompile.models import hf_experts
from ktcompile.models.load import folder_of
from ktcompile.models.packed_cache import PackedCache, cache_for, key_of
from ktcompile.models.packed_file import PackedFile, PackedFileError, address_of, verify
from ktcompile.models.packed_model import mapped_layer, open_parts, payloads, tensors_of, write_layer, write_tensor
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.linear import PackedLinear
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.quant import full_name
from ktcompile.runtime.stored_graph import NotStorableError, of_json, to_json

if TYPE_CHECKING:
    from ktcompile.engine.runner import ModelRunner
    from ktcompile.models.hf_paged import LayerBlocks

# Goes up when the same options keep something else.
_VERSION = 1
_INPUTS = ("block_table", "lengths", "query_starts")
_EXAMPLE = "logits of the example"


class KeptStepError(ValueError):
    """What was kept cannot be used; the message says why."""


class KeptStep:
    """What an earlier start kept. summary: of its model. kv_format: a name. layers: what they keep of a position.
    experts: packed, of each layer that has such."""

    def __init__(self, header: dict[str, Any], file: PackedFile, weights: PackedFile) -> None:
        """Read two files of the cache. Any error but OSError: they are damaged, or of another version."""
        memory = file.map()
        verify(memory, payloads(header))
        specs = {path: ExpertsSpec.decode(spec) for path, spec in header["specs"].items()}
        names = [where[1] for where in header["given"] if where[0] == "tensor"]
        self._tensors, experts = open_parts(weights, names, specs)
        self._handles = {path: layer.handle for path, layer in experts.items()}
        begin, owner = address_of(memory)
        self._packed = [PackedLinear.mapped(mapped_layer(each, begin, owner)) for each in header["linear"].values()]
        self._header, self._module = header, of_json(header["graph"])
        (example,) = header["tensors"]
        self._example = tensors_of(example, file.map_private(file.size))[_EXAMPLE].clone()
        self.summary = ModelSummary.of_json(header["summary"])
        self.kv_format: str = header["kv_format"]
        self.layers = [LayerKV(**layer) for layer in header["layers"]]
        self.experts: list[PackedExperts] = list(experts.values())

    def graph(self, storage: Sequence[LayerBlocks], inputs: StepInputs) -> StepGraph:
        """Return the step's graph on memory for keys and values and the inputs of an engine."""
        given: list[Any] = []
        for kind, *where in self._header["given"]:
            match kind:
                case "tensor":
                    given.append(self._tensors[where[0]])
                case "experts":
                    given.append(self._handles[where[0]])
                case "storage":
                    layer, part = where
                    given.append(storage[layer][part])
                case "input":
                    given.append(getattr(inputs, where[0]))
                case _:  # what steps bring, or nobody reads
                    given.append(None)
        from_step = tuple(FromStep(*each) for each in self._header["from_step"])
        layers = [self._packed[i] for i in self._header["packed"]]
        return StepGraph(self._module.forward, given, from_step, layers, self._module.graph)

    def check(self, run: Callable[[], Tensor]) -> None:
        """KeptStepError: the example, which `run` computes, has other logits than the start had that kept it."""
        try:
            logits = run()
        except Exception as error:
            raise KeptStepError(f"it cannot be run: {error}") from error
        if torch.equal(logits, self._example):
            return
        off = float((logits - self._example).norm() / self._example.norm())
        if self._header["isa"] == machine().isa or not off < ROUNDING:
            raise KeptStepError(f"it gives other logits than it did (relative error {off:.2g})")


def find(name: str, options: EngineOptions, cache_option: str | Path | None) -> KeptStep | None:
    """Return what an engine of a model kept with these options, None if there is nothing, or with a warning if it is
    damaged.

    name: as of `ktcompile.models.load.locate`. cache_option: as of `ktcompile.load`.
    """
    with _place(name, options, cache_option) as place:
        if place is None:
            return None
        cache, weights_key, key, _ = place
        with _opened(cache, key) as file, _opened(cache, weights_key) as weights:
            if file is not None and weights is not None:
                try:
                    return KeptStep(file.header, file, weights)
                except OSError:
                    raise
                except Exception as error:
                    logger.warning("the kept step %s is not used, and replaced: %s", cache.path(key), error)
    return None


def keep(runner: ModelRunner, name: str, options: EngineOptions, cache_option: str | Path | None) -> bool:
    """Write what a runner of a model that `ktcompile.load` returned runs, and return whether it was.

    Arguments are as of `find`. It is not where the model has no graph by itself, or one that cannot be written down;
    what is wrong with the disk is a warning.
    """
    with _place(name, options, cache_option) as place:
        if place is None or runner.graph is None or runner.graph.graph is None:
            return False
        cache, weights_key, key, folder = place
        try:
            given, specs = _given(runner, runner.graph)
            graph = to_json(runner.graph.graph)
            linear = _distinct(runner.graph.layers)
        except NotStorableError as error:
            logger.debug("the step of %s is not kept: it has %s", name, error)
            return False
        example = runner.example_logits(options.block_size)
        with cache.writing(key, sum(layer.nbytes for layer in linear) + example.nbytes) as writer:
            header = {
                "model": str(folder.resolve()),
                "weight_format": full_name(options.weight_format),
                "kind": "step",
                "weights": weights_key,
                "tensors": [write_tensor(writer, _EXAMPLE, example)],
                "experts": {},
                "linear": {
                    f"linear layer {i}": write_layer(writer, each, (each.heads, each.out_features, each.in_features))
                    for i, each in enumerate(linear)
                },
                "packed": [linear.index(layer) for layer in runner.graph.layers],
                "specs": specs,
                "given": given,
                "from_step": runner.graph.from_step,
                "graph": graph,
                "isa": machine().isa,
                "summary": runner.summary.to_json(),
                "kv_format": runner.kv_format.name,
                "layers": [asdict(layer) for layer in runner.layers],
            }
            writer.finish(header)
        return True
    return False


@contextmanager
def _place(
    name: str, options: EngineOptions, cache_option: str | Path | None
) -> Iterator[tuple[PackedCache, str, str, Path] | None]:
    """Give the cache, the keys of a packed model and of its step, and the folder of the checkpoint; None where steps
    are not kept. What is wrong with the disk is a warning, and ends the block."""
    if options.eager or options.device != "none" or options.routing_profile is not None:
        yield None
        return
    folder = folder_of(name)
    cache = cache_for(cache_option, folder)
    if cache is None:
        yield None
        return
    weights_key = key_of(folder, options.weight_format)
    settings = folder / "generation_config.json"
    identity = {
        "weights": weights_key,
        "options": [options.dense_format, options.head_format, options.kv_format, options.mla_storage],
        "generation": settings.read_text() if settings.is_file() else None,
        "versions": [_VERSION, ktcompile.__version__, torch.__version__],
    }
    try:
        yield cache, weights_key, xxhash.xxh3_128_hexdigest(json.dumps(identity).encode()), folder
    except OSError as error:
        logger.warning("the cache of packed models is not used: %s", error)


@contextmanager
def _opened(cache: PackedCache, key: str) -> Iterator[PackedFile | None]:
    """Give the file of a key, None if there is none, or with a warning if it is damaged. OSError."""
    try:
        file = cache.open(key)
    except PackedFileError as error:
        logger.warning("%s is not used, and replaced: %s", cache.path(key), error)
        file = None
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _given(runner: ModelRunner, graph: StepGraph) -> tuple[list[list[Any]], dict[str, str]]:
    """Return what each argument of a graph is, and the specs of the experts among them. NotStorableError: one is of
    the model, but not one of its tensors."""
    model = runner.model
    assert model is not None
    known: dict[int, list[Any]] = {}
    specs: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        known[id(tensor)] = ["tensor", name]
    for path, module in model.named_modules():
        if hf_experts.is_packed(module):
            known[id(hf_experts.handle(module))] = ["experts", path]
            specs[path] = hf_experts.packed(module).spec.encode()
    for i, layer in enumerate(runner.storage):
        known |= {id(tensor): ["storage", i, part] for part, tensor in enumerate(layer[:4]) if tensor is not None}
    known |= {id(getattr(runner.inputs, name)): ["input", name] for name in _INPUTS}
    given = []
    for value in graph.given:
        where = ["none"] if value is None else known.get(id(value))
        if where is None:
            raise NotStorableError("a tensor that is not one of the model's")
        given.append(where)
    used = {where[1] for where in given if where[0] == "experts"}
    return given, {path: spec for path, spec in specs.items() if path in used}


def _distinct(layers: Sequence[object]) -> list[PackedLinear]:
    """Return layers, each once. NotStorableError: one is no linear layer."""
    found: list[PackedLinear] = []
    for layer in layers:
        if not isinstance(layer, PackedLinear):
            raise NotStorableError("experts that were packed for the graph alone")
        if layer not in found:
            found.append(layer)
    return found
