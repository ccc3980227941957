"""The modules of this process, and what they call a tensor's owner. Looked up, not passed along, since a tensor that
reaches an operator has lost them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch
from torch import nn

_WRAPPER = "_orig_mod."  # what torch.compile puts before the names of a model


def alive_modules() -> Iterator[nn.Module]:
    """Yield every module that is alive and initialised, in no particular order."""
    frozen = gc.get_freeze_count() > 0
    if frozen:  # as servers do with what they load; the collector does not list it then
        gc.unfreeze()
    objects = gc.get_objects()
    if frozen:
        gc.collect()  # or garbage would stay for good
        gc.freeze()
    for candidate in objects:
        if issubclass(type(candidate), nn.Module) and "_parameters" in vars(candidate):
            yield candidate


def qualified_name(tensors: Sequence[torch.Tensor]) -> str:
    """Return the name of the module that holds one of the tensors, as the outermost module around it calls it; "" if
    none does. It looks at every module: for messages, not for what is called often."""
    wanted = {t.untyped_storage()._cdata for t in tensors}
    modules = list(alive_modules())
    owner = next((m for m in modules if any(_storage(t) in wanted for t in _held(m))), None)
    if owner is None:
        return ""
    names = (name for root in modules for name, module in root.named_modules() if module is owner)
    return max(names, key=len).replace(_WRAPPER, "") or type(owner).__name__


def _held(module: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # fake and other tensors without memory
        return None
