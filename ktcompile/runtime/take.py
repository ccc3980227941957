"""Moves experts' weights out of a model: the packed form becomes the only one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.store import ExpertStore


def take_weights(
    store: ExpertStore, module: nn.Module, weights: Sequence[torch.Tensor | None], spec: ExpertsSpec
) -> PackedExperts:
    """Return the packed weights of an experts module, their source storage freed.

    The module's parameters keep their shape but read as NaN, so that a use outside of the compiled graph shows;
    its state_dict returns the weights, unpacked. ValueError: the weights are not parameters of the module.
    """
    if store.is_taken(weights, spec):
        return store.get(weights, spec)
    names = (_name(module, weights[0]), _name(module, weights[1]))
    packed = store.take(weights, spec)
    hook = _Unpack(packed, module, names)
    module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return packed


class _Unpack:
    """A state_dict hook that puts the unpacked weights in the place of the NaN."""

    def __init__(self, packed: PackedExperts, module: nn.Module, names: tuple[str, str]) -> None:
        self._packed = weakref.ref(packed)
        self._names = names
        self._versions = [getattr(module, name)._version for name in names]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        packed = self._packed()
        if packed is None:  # other weights were packed since: the parameters hold them
            return
        tensors = [torch.empty(state[prefix + n].shape, dtype=state[prefix + n].dtype) for n in self._names]
        packed.unpack_into(tensors[0], tensors[1])
        for name, version, tensor in zip(self._names, self._versions, tensors, strict=True):
            parameter = getattr(module, name)
            if parameter._version == version and parameter[0, 0, 0].isnan():  # nothing else was written or set
                state[prefix + name] = tensor


def _name(module: nn.Module, weight: torch.Tensor | None) -> str:
    for name, parameter in module._parameters.items():
        if parameter is weight is not None:
            return name
    raise ValueError(f"weights='take' needs weights that are parameters of {type(module).__name__}; use 'copy'")
