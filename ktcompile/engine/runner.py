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
from ktcompile.engine.traced import TracedStep
from ktcompile.kv.layout import LayerKV, block_bytes, blocks_for, num_blocks
from ktcompile.kv.storage import allocate, default_budget, latent_kv, layer_kv
from ktcompile.log import warn_once
from ktcompile.models import hf_paged
from ktcompile.models.hf_paged import AttentionCall, LayerBlocks, PagedStep
from ktcompile.models.latents import Found, expand_again, find, keep_latents
from ktcompile.ops.kv import KV_FORMATS, KVFormat
from ktcompile.scheduler.batch import Chunk, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where neither the model nor an option says.
_LONGEST = 32768
# Relative errors of logits that arithmetic makes are below this.
_ROUNDING = 0.2


class StepLogits(NamedTuple):
    """The logits of a step, fp32 [R, V]. places: chunk i has the rows [places[i], places[i + 1])."""

    values: Tensor
    places: list[int]


class ModelRunner:
    """A model with memory for keys and values of many sequences.

    num_blocks, max_model_len: what that memory holds, and how long a sequence may be. kv_format, layers: what it keeps
    of each position. storage: that memory, by layer. note: is told what happens. UnsupportedModelError: the model
    cannot run over blocks, and is as it was. ValueError: there is no memory for one block.
    """

    def __init__(
        self, model: PreTrainedModel, options: EngineOptions, note: Callable[[str], None] = lambda _: None
    ) -> None:
        note("running the model on a few tokens, to learn what its layers keep")
        self.model = model
        found = _latents(model, options)
        if found.why_not:
            warn_once(f"{type(model).__name__} keeps the keys and values of all heads: {found.why_not}")
        calls = attention_calls(model, found.layers)
        longest = _longest(model, options)
        self.kv_format = _format(options, calls[0].dtype)
        layers = [_kept(self.kv_format, call) for call in calls]
        sequences = max(3, options.max_num_seqs)  # three are run to check the model
        needed = sequences * blocks_for(longest, options.block_size)
        budget = default_budget() if options.kv_device_memory is None else options.kv_device_memory
        self.num_blocks = min(needed, num_blocks(budget, layers, options.block_size))
        self.max_model_len = min(longest, self.num_blocks * options.block_size)
        self.kv_bytes = self.num_blocks * block_bytes(layers, options.block_size)
        self.layers = tuple(layers)
        note(f"making room for {self.num_blocks * options.block_size:,} positions of {self.kv_text}")
        storage = allocate(self.kv_format, layers, self.num_blocks, options.block_size)
        self.storage = tuple(
            LayerBlocks(kv.key, kv.value, kv.key_scales, kv.value_scales, call.latents is not None)
            for kv, call in zip(storage, calls, strict=True)
        )
        self._inputs = StepInputs(sequences, blocks_for(self.max_model_len, options.block_size), options.block_size)
        with paged_implementation(model, found.layers), torch.no_grad():
            self._forward = forward = self._uncompiled()
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

    @property
    def kv_text(self) -> str:
        """What a position takes, and of what, for messages."""
        size = block_bytes(self.layers, 1)
        latent = sum(layer.latent_dim > 0 for layer in self.layers)
        what = "keys and values" if not latent else "latents" if latent == len(self.layers) else "latents and keys"
        return f"{what} in {self.kv_format.name}, {size:,} bytes each"

    def run(self, step: Step) -> StepLogits:
        """Compute a step: store the keys and values of its tokens, and return the logits that it asks for."""
        ids, positions, slots, rows, places = self._inputs.make(step)
        return StepLogits(self._forward(ids, positions, slots, rows), places)

    def _uncompiled(self) -> Callable[..., Tensor]:
        """Return what runs the model on the tensors of a step."""
        model, inputs, layers = self.model, self._inputs, self.storage
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
        inputs, size = self._inputs, options.block_size
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
            # None of Dynamo's guards is looked at. The model is the engine's own, each step has the same kinds of
            # tensors, and `_check_compiled` sees that what was traced for one number of tokens is right for any.
            "guard_filter_fn": lambda guards: [False] * len(guards),
        }
        step = _step(_chunk("a", (1, 2, 3), 0, size), _chunk("b", (4, 5), blocks_for(3, size), size))
        tensors = inputs.make(step)[:4]
        traced = TracedStep(tensors)
        compiled: Callable[..., Tensor] = torch.compile(
            _with_own_code(forward), backend=traced, dynamic=True, fullgraph=True, options=settings
        )
        # The first call is traced and checks the kernels, and runs operation by operation. What modules have as numbers
        # is constant; else each call would be given it anew.
        with torch._dynamo.config.patch(specialize_float=True):
            compiled(*tensors)
        alone = traced.forward()
        return alone if alone is not None and torch.equal(alone(*tensors), compiled(*tensors)) else compiled

    def _refuse_mixing(self, block_size: int) -> None:
        """UnsupportedModelError: a token has other logits in other company, so layers keep something that is not in the
        blocks, or mix tokens."""
        error = self._error_of_company(block_size)
        if not error < _ROUNDING:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives a token other logits in other company (relative error {error:.2g}):"
                " layers keep something of a sequence that is not keys and values, or mix tokens"
            )

    def _check_compiled(self, block_size: int) -> None:
        """Warn if a token's bits depend on its company. RuntimeError: more than rounding does."""
        name = type(self.model).__name__
        error = self._error_of_company(block_size)
        if not error < _ROUNDING:
            raise RuntimeError(f"{name}, compiled, gives a token other logits in other company ({error:.2g})")
        if error > 0:
            warn_once(f"{name} rounds a token's logits otherwise in other company (relative error {error:.2g})")

    def _error_of_company(self, size: int) -> float:
        """Return how far logits of tokens are from those in the company of others; NaN where one of them is."""
        behind = blocks_for(3, size)  # those of the first sequence
        last = behind + blocks_for(2, size)
        if last + behind > self.num_blocks or self.max_model_len < 3:
            raise ValueError(f"{self.num_blocks} blocks of {size} positions are too few; raise kv_device_memory")
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


def _longest(model: PreTrainedModel, options: EngineOptions) -> int:
    """Return the positions of a sequence. ValueError: more are asked for than the model has."""
    has = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if options.max_model_len is None:
        return int(has or _LONGEST)
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


def _step(*chunks: Chunk) -> Step:
    return Step(chunks, ())
