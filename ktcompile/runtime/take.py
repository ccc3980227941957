"""Moves experts' weights out of a model: the packed form becomes the only one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ktcompile.graph.owners import Owner, ParameterOwners
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.store import ExpertStore


def take_weights(store: ExpertStore, weights: Sequence[torch.Tensor | None], spec: ExpertsSpec) -> PackedExperts:
    """Return the packed weights, their source storage freed.

    The module's parameters keep their shape but read as NaN, so that a use outside of the compiled graph shows;
    its state_dict returns the weights, unpacked. ValueError: no module owns the weights.
    """
    if store.is_taken(weights, spec):
        return store.get(weights, spec)
    owners = ParameterOwners()
    gate_up, down = (_owner(owners, w) for w in weights[:2])
    packed = store.take(weights, spec)
    # The hook holds no module, and lives as long as the module that it is registered on.
    hook = _Unpack(packed, gate_up.name, down.name)
    gate_up.module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return packed


class _Unpack:
    """A state_dict hook that puts the unpacked weights in the place of the NaN."""

    def __init__(self, packed: PackedExperts, gate_up: str, down: str) -> None:
        self._packed = weakref.ref(packed)
        self._names = (gate_up, down)

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        packed = self._packed()
        if packed is None:  # other weights were written since: the parameters hold them
            return
        tensors = [torch.empty(state[prefix + n].shape, dtype=state[prefix + n].dtype) for n in self._names]
        packed.unpack_into(tensors[0], tensors[1])
        for name, tensor in zip(self._names, tensors, strict=True):
            state[prefix + name] = tensor


def _owner(owners: ParameterOwners, weight: torch.Tensor | None) -> Owner:
    owner = None if weight is None else owners.find(weight)
    if owner is None:
        raise ValueError("weights='take' needs weights that are parameters of a module; use weights='copy'")
    return owner
