"""Runs the model on the steps of the scheduler.

Shape suffixes: R rows whose logits are wanted, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ktcompile.engine.inputs import StepInputs
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.probe import UnsupportedModelError, attention_calls, paged_implementation
from ktcompile.engine.step_graph import ROUNDING, StepGraph
from ktcompile.engine.summary import ModelSummary
from ktcompile.kv.layout import LayerKV, block_bytes, blocks_for, num_blocks
from ktcompile.kv.storage import allocate, default_budget, latent_kv, layer_kv
from ktcompile.log import warn_once
from ktcompile.models import hf_experts, hf_paged
from ktcompile.models.hf_paged import AttentionCall, LayerBlocks, PagedStep
from ktcompile.models.latents import Found, expand_again, find, keep_latents
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.kv import KV_FORMATS, KVFormat
from ktcompile.scheduler.batch import Chunk, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ktcompile.engine.kept_step import KeptStep

# Where neither the model nor an option says.
_LONGEST = 32768


class StepLogits(NamedTuple):
    """The logits of a step, fp32 [R, V]. places: chunk i has the rows [places[i], places[i + 1])."""

    values: Tensor
    places: list[int]


class ModelRunner:
    """A model with memory for keys and values of many sequences.

    model: None where an earlier start's step is run. summary: of it. num_blocks, max_model_len: what that memory holds,
    and how long a sequence may be. kv_format, layers: what it keeps of each position. storage: that memory, by layer.
    graph: a step's, None if there is none by itself. note: is told what happens. UnsupportedModelError: the model
    cannot run over blocks, and is as it was. ValueError: there is no memory for one block.
    """

    def __init__(
        self, model: PreTrainedModel, options: EngineOptions, note: Callable[[str], None] = lambda _: None
    ) -> None:
        note("running the model on a few tokens, to learn what its layers keep")
        self.model: PreTrainedModel | None = model
        self.summary = ModelSummary.of_model(model)
        self.graph: StepGraph | None = None
        self._experts: list[PackedExperts] = []
        found = _latents(model, options)
        if found.why_not:
            warn_once(f"{self.summary.kind} keeps the keys and values of all heads: {found.why_not}")
        calls = attention_calls(model, found.layers)
        self.kv_format = _format(options, calls[0].dtype)
        self._make_room([_kept(self.kv_format, call) for call in calls], options, note)
        with paged_implementation(model, found.layers), torch.no_grad():
            self._forward = forward = self._uncompiled(model)
            self._refuse_mixing(options.block_size)
        model.set_attn_implementation(hf_paged.NAME)
        keep_latents(found.layers)
        model.requires_grad_(False)  # nothing for gradients is kept in a step, whoever runs it
        if options.eager or options.device != "none":  # a device's experts are seen to by hooks of the model
            return
        note("tracing the model and packing its weights")
        with torch.no_grad():
            self._forward = self._compiled(forward, options)
            self._check_compiled(options.block_size)

    @classmethod
    def of_kept(
        cls, kept: KeptStep, options: EngineOptions, note: Callable[[str], None] = lambda _: None
    ) -> ModelRunner:
        """Return what runs the step of an earlier start. KeptStepError: it gives other logits than it did."""
        self = cls.__new__(cls)
        self.model, self.summary, self.kv_format = None, kept.summary, KV_FORMATS[kept.kv_format]
        self._make_room(kept.layers, options, note)
        self._experts = kept.experts
        self.graph = kept.graph(self.storage, self.inputs)
        self._forward = self.graph.forward()
        with torch.no_grad():
            kept.check(lambda: self.example_logits(options.block_size))
        return self

    def _make_room(self, layers: Sequence[LayerKV], options: EngineOptions, note: Callable[[str], None]) -> None:
        """Allocate what keys and values and a step's inputs take."""
        longest = _longest(self.summary, options)
        sequences = max(3, options.max_num_seqs)  # three are run to check the model
        needed = sequences * blocks_for(longest, options.block_size)
        budget = default_budget() if options.kv_device_memory is None else options.kv_device_memory
        self.num_blocks = min(needed, num_blocks(budget, layers, options.block_size))
        self.max_model_len = min(longest, self.num_blocks * options.block_size)
        self.kv_bytes = self.num_blocks * block_bytes(layers, options.block_size)
        self.layers = tuple(layers)
        tried = 2 * blocks_for(3, options.block_size) + blocks_for(2, options.block_size)
        if tried > self.num_blocks or self.max_model_len < 3:
            raise ValueError(
                f"{self.num_blocks} blocks of {options.block_size} positions are too few; raise kv_device_memory"
            )
        note(f"making room for {self.num_blocks * options.block_size:,} positions of {self.kv_text}")
        storage = allocate(self.kv_format, layers, self.num_blocks, options.block_size)
        self.storage = tuple(
            LayerBlocks(kv.key, kv.value, kv.key_scales, kv.value_scales, layer.latent_dim > 0)
            for kv, layer in zip(storage, layers, strict=True)
        )
        self.inputs = StepInputs(sequences, blocks_for(self.max_model_len, options.block_size), options.block_size)

    @property
    def experts(self) -> list[list[PackedExperts]]:
        """The packed forms of each layer of experts."""
        if self.model is None:
            return [[layer] for layer in self._experts]
        return [hf_experts.packed_forms(module) for module in hf_experts.experts_modules(self.model)]

    @property
    def kv_text(self) -> str:
        """What a position takes, and of what, for messages."""
        size = block_bytes(self.layers, 1)
        latent = sum(layer.latent_dim > 0 for layer in self.layers)
        what = "keys and values" if not latent else "latents" if latent == len(self.layers) else "latents and keys"
        return f"{what} in {self.kv_format.name}, {size:,} bytes each"

    def run(self, step: Step) -> StepLogits:
        """Compute a step: store the keys and values of its tokens, and return the logits that it asks for."""
        ids, positions, slots, rows, places = self.inputs.make(step)
        return StepLogits(self._forward(ids, positions, slots, rows), places)

    def example_logits(self, block_size: int) -> Tensor:
        """Return the logits of a step of two short sequences, fp32 [2, V]."""
        return self.run(_example(block_size)).values

    def _uncompiled(self, model: PreTrainedModel) -> Callable[..., Tensor]:
        """Return what runs the model on the tensors of a step."""
        inputs, layers = self.inputs, self.storage
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

        def forward(input_ids: Tensor, position_ids: Tensor, slot_mapping: Tensor, rows: Tensor) -> Tensor:
            kv_step = PagedStep(layers, slot_mapping, inputs.block_table, inputs.lengths, inputs.query_starts)
            kept = {"logits_to_keep": rows} if keeps else {}
            result = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, kv_step=kv_step, **kept)
            logits: Tensor = result.logits[0]
            # As tokens are chosen from, which is less work in a compiled step than behind it.
            return (logits if keeps else logits[rows]).float()

        return forward

    def _compiled(self, forward: Callable[..., Tensor], options: EngineOptions) -> Callable[..., Tensor]:
        """Return what `forward` does, compiled; the model's weights are taken."""
        inputs, size = self.inputs, options.block_size
        for tensor in (
            *(t for layer in self.storage for t in layer[:4]),
            inputs.block_table,
            inputs.lengths,
            inputs.query_starts,
        ):
            if tensor is not None:
                torch._dynamo.mark_static(tensor)
        settings: dict[str, Any] = {
            "weights": "take",
            "weight_format": options.weight_format,
            "dense_format": options.dense_format,
            "head_format": options.head_format,
            # None of Dynamo's guards is looked at. The model is the engine's own, each step has the same kinds of
            # tensors, and `_check_compiled` sees that what was traced for one number of tokens is right for any.
            "guard_filter_fn": lambda guards: [False] * len(guards),
        }
        from ktcompile.engine.traced import TracedStep  # seconds, for all that traces and rewrites graphs

        tensors = inputs.make(_example(size))[:4]
        traced = TracedStep(tensors)
        compiled: Callable[..., Tensor] = torch.compile(
            _with_own_code(forward), backend=traced, dynamic=True, fullgraph=True, options=settings
        )
        # The first call is traced and checks the kernels, and runs operation by operation. What modules have as numbers
        # is constant; else each call would be given it anew.
        with torch._dynamo.config.patch(specialize_float=True):
            compiled(*tensors)
        graph = traced.graph()
        if graph is None or not torch.equal((alone := graph.forward())(*tensors), compiled(*tensors)):
            return compiled
        self.graph = graph
        return alone

    def _refuse_mixing(self, block_size: int) -> None:
        """UnsupportedModelError: a token has other logits in other company, so layers keep something that is not in the
        blocks, or mix tokens."""
        error = self._error_of_company(block_size)
        if not error < ROUNDING:
            raise UnsupportedModelError(
                f"{self.summary.kind} gives a token other logits in other company (relative error {error:.2g}):"
                " layers keep something of a sequence that is not keys and values, or mix tokens"
            )

    def _check_compiled(self, block_size: int) -> None:
        """Warn if a token's bits depend on its company. RuntimeError: more than rounding does."""
        name = self.summary.kind
        error = self._error_of_company(block_size)
        if not error < ROUNDING:
            raise RuntimeError(f"{name}, compiled, gives a token other logits in other company ({error:.2g})")
        if error > 0:
            warn_once(f"{name} rounds a token's logits otherwise in other company (relative error {error:.2g})")

    def _error_of_company(self, size: int) -> float:
        """Return how far logits of tokens are from those in the company of others; NaN where one of them is."""
        behind = blocks_for(3, size)  # those of the first sequence
        last = behind + blocks_for(2, size)
        both = _chunk("a", (1, 2, 3), 0, size), _chunk("b", (4, 5), behind, size)
        together = self.run(_step(*both, _chunk("c", (6, 7, 8), last, size))).values
        alone = self.run(_step(_chunk("a", (3,), 0, size, begin=2))).values
        apart = self.run(_step(_chunk("b", (4, 5), behind, size))).values
        pairs = ((alone[0], together[0]), (apart[0], together[1]))
        if all(torch.equal(x, y) for x, y in pairs):
            return 0.0
        errors = [(x - y).float().norm() / y.float().norm() for x, y in pairs]
        return float(torch.stack(errors).max())


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function with a code object of its own: Dynamo counts recompilations by code object, and each engine
    has its own model."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def _latents(model: PreTrainedModel, options: EngineOptions) -> Found:
    """Return the layers that keep latents, whatever an engine before had them do."""
    expand_again(model.modules())
    if options.mla_storage == "expanded":
        return Found({})
    found = find(model)
    kv_format = _format(options, model.dtype)
    for sizes in found.layers.values():
        if not kv_format.holds_latents(sizes.latent + sizes.rotated, sizes.latent):
            return Found(
                {}, f"in {kv_format.name} latents of {sizes.latent} would share scales with what is beside them"
            )
    return found


def _kept(kv_format: KVFormat, call: AttentionCall) -> LayerKV:
    """Return what a layer keeps of a position."""
    if call.latents is not None:
        return latent_kv(kv_format, call.key_size, call.value_size)
    return layer_kv(kv_format, call.kv_heads, call.key_size, call.value_size)


def _longest(summary: ModelSummary, options: EngineOptions) -> int:
    """Return the positions of a sequence. ValueError: more are asked for than the model has."""
    has = summary.positions
    if options.max_model_len is None:
        return has or _LONGEST
    if has is not None and options.max_model_len > has:
        raise ValueError(f"max_model_len is {options.max_model_len}; the model has {has} positions")
    return options.max_model_len


def _format(options: EngineOptions, dtype: torch.dtype) -> KVFormat:
    if options.kv_format != "auto":
        return KV_FORMATS[options.kv_format]
    return next(f for f in KV_FORMATS.values() if f.dtype == dtype)


def _chunk(name: str, token_ids: Sequence[int], block: int, size: int, begin: int = 0) -> Chunk:
    end = begin + len(token_ids)
    blocks = tuple(block + i for i in range(blocks_for(end, size)))
    return Chunk(name, tuple(token_ids), begin, blocks, logits_from=end - 1, samples=True)


def _example(size: int) -> Step:
    """Return a step of two sequences, in blocks of `size` positions."""
    return _step(_chunk("a", (1, 2, 3), 0, size), _chunk("b", (4, 5), blocks_for(3, size), size))


def _step(*chunks: Chunk) -> Step:
    return Step(chunks, ())
