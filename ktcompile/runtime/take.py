"""Moves weights out of a model: the packed form becomes the only one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ktcompile.ops.store import P, Packed, S, WeightStore


def take_weights(
    store: WeightStore[S, P], modules: Sequence[nn.Module], weights: Sequence[torch.Tensor | None], spec: S
) -> P:
    """Return the packed form of weights, their source storage freed.

    modules: the owner of each weight (not of the biases). Their parameters keep their shape but read as NaN, so that a
    use outside of the compiled graph shows; their state_dict returns the weights, unpacked. ValueError: a weight is not
    a parameter of its module.
    """
    if store.is_taken(weights, spec):
        return store.get(weights, spec)
    owners = [(module, _name(module, weight)) for module, weight in zip(modules, weights, strict=False)]
    packed = store.take(weights, spec)
    like = [getattr(module, name).detach() for module, name in owners]
    for module in {id(m): m for m in modules}.values():
        names = {name: i for i, (owner, name) in enumerate(owners) if owner is module}
        module.register_state_dict_post_hook(_Unpack(packed, module, names, like))  # type: ignore[no-untyped-call]
    return packed


class _Unpack:
    """A state_dict hook that puts a module's unpacked weights in the place of the NaN.

    names: which of the packed weights each of its parameters is. like: all of them, as their parameters are.
    """

    def __init__(self, packed: Packed, module: nn.Module, names: dict[str, int], like: Sequence[torch.Tensor]) -> None:
        self._packed = weakref.ref(packed)
        self._names, self._like = names, [(t.shape, t.dtype) for t in like]
        self._versions = {name: getattr(module, name)._version for name in names}

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        packed = self._packed()
        if packed is None:  # other weights were packed since: the parameters hold them
            return
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in self._like]
        packed.unpack_into(*tensors)
        for name, index in self._names.items():
            parameter = getattr(module, name)
            # Nothing else was written or set.
            if parameter._version == self._versions[name] and bool(parameter.flatten()[0].isnan()):
                state[prefix + name] = tensors[index]


def _name(module: nn.Module, weight: torch.Tensor | None) -> str:
    for name, parameter in module._parameters.items():
        if parameter is weight is not None:
            return name
    raise ValueError(f"weights='take' needs weights that are parameters of {type(module).__name__}; use 'copy'")
