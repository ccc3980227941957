"""The operator `kt::fp8_experts`: experts from the codes and scales in the parameters of transformers' `FP8Experts`.

Its graph input are the parameters, so that one compiled graph serves every layer that traces to it; their packed form
is looked up at each call.

Shape suffixes: T tokens, K top_k, H hidden_size.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.library import LIBRARY, register_without_backward
from ktcompile.ops.moe import run
from ktcompile.ops.observer import observe
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.store import places_of, storages_of, versions_of
from ktcompile.quant.checkpoints import Fp8Reader

LIBRARY.define(
    "fp8_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor gate_up_scale,"
    " Tensor down_proj, Tensor down_scale, int[]? block, str spec) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Fp8Weights(NamedTuple):
    """Codes and scales as in `FP8Experts`: fp8 with blocks of scales, or pairs of four bits with their exponents.

    gate_up: [E, 2I, H], gate first then up, each with scales of its own; [E, I, H] where there is no gate.
    down: [E, H, I].
    """

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor


def fp8_experts(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    experts: Fp8Weights,
    block: tuple[int, int] | None,
    spec: str,
) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs, [T, H].

    block: rows and columns that share a scale; None is as for `ktcompile.quant.stored.read_fp8`. spec: an encoded
    `ExpertsSpec`. ValueError: the weights cannot be read, or as for `ktcompile.ops.moe`.
    """
    shared = None if block is None else list(block)
    result: torch.Tensor = torch.ops.kt.fp8_experts.default(x_TH, ids_TK, weights_TK, *experts, shared, spec)
    return result


class Fp8Store:
    """Finds the packed form of weights, packing them when they are new or were written to since."""

    def __init__(self) -> None:
        self._entries: dict[object, tuple[tuple[int, ...], tuple[StorageWeakRef, ...], PackedExperts]] = {}
        self._lock = threading.Lock()

    def get(self, weights: Fp8Weights, block: tuple[int, int] | None, spec: ExpertsSpec) -> PackedExperts:
        """Return the packed weights. ValueError: they cannot be read."""
        key = (*places_of(weights), block, spec)
        versions = versions_of(weights)
        with self._lock:
            if key in self._entries:
                known, storages, packed = self._entries[key]
                if known == versions and not any(s.expired() for s in storages):  # type: ignore[no-untyped-call]
                    return packed
            packed = _pack(weights, block, spec)
            if key not in self._entries:
                weakref.finalize(weights.gate_up.untyped_storage(), self._entries.pop, key, None)
            self._entries[key] = versions, storages_of(weights), packed
            return packed


@functools.cache
def fp8_store() -> Fp8Store:
    """Return the store of this process."""
    return Fp8Store()


def _pack(weights: Fp8Weights, block: tuple[int, int] | None, spec: ExpertsSpec) -> PackedExperts:
    up = "gate_up_proj" if spec.activation.gated else "up_proj"
    names = (up, f"{up}_scale_inv", "down_proj", "down_proj_scale_inv")
    tensors = dict(zip(names, (w.detach() for w in weights), strict=True))
    reader = Fp8Reader(block)
    return PackedExperts(reader.read(tensors, up), reader.read(tensors, "down_proj"), None, None, spec)


@torch.library.impl(LIBRARY, "fp8_experts", "CPU")
def _fp8_experts_cpu(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    block: list[int] | None,
    spec: str,
) -> torch.Tensor:
    shared = None if block is None else (block[0], block[1])
    experts = Fp8Weights(gate_up, gate_up_scale, down, down_scale)
    packed = fp8_store().get(experts, shared, ExpertsSpec.decode(spec))
    result = run(x, ids, weights, packed)
    observe(packed, ids)
    return result


@torch.library.register_fake("kt::fp8_experts", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fp8_experts_fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape)


register_without_backward("fp8_experts")
