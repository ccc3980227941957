"""What is known of the tensors of a call is forgotten when one of them is another, or elsewhere, or was written to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ktcompile._native import Watch
from ktcompile.ops.store import storages_of


def _watch(*tensors: Tensor) -> Watch:
    watch = Watch()
    for i, (tensor, storage) in enumerate(zip(tensors, storages_of(tensors), strict=True)):
        watch.add(i, tensor, storage.cdata)
    return watch


def _write(x: Tensor) -> Tensor:
    return x.add_(1)


def _move(x: Tensor) -> Tensor:
    x.data = x.data.clone()
    return x


def _same_memory(x: Tensor) -> Tensor:
    return x.view(-1)


@pytest.mark.parametrize("change", [_write, _move, _same_memory, torch.clone])
@pytest.mark.parametrize("which", [0, 1])
def test_a_change_is_seen(change: Callable[[Tensor], Tensor], which: int) -> None:
    tensors = [torch.zeros(3), torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)]
    watch = _watch(*tensors)
    assert watch.holds((*tensors, 5)) and watch.holds(tuple(tensors))
    tensors[which] = change(tensors[which])
    assert not watch.holds(tuple(tensors))


def test_nothing_is_kept_alive_and_other_arguments_do_not_hold() -> None:
    tensor = torch.zeros(3)
    watch, alive = _watch(tensor), weakref.ref(tensor)
    assert not watch.holds(())
    with pytest.raises(TypeError):
        Watch().add(0, object(), 0)
    del tensor
    gc.collect()
    assert alive() is None and not watch.holds((None,)) and not watch.holds((torch.zeros(3),))


def test_what_watches_nothing_holds() -> None:
    assert Watch().holds(()) and Watch().holds((1,))
