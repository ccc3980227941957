"""Who is told which experts the layers of models are asked for.

Shape suffixes: T tokens, K top_k.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from ktcompile.ops.experts import PackedExperts

# Is given a layer and the ids of one call, on the CPU [T, K]; those of num_experts and more are another machine's.
Observer = Callable[[PackedExperts, torch.Tensor], None]


class Observers:
    """Those who are told, in the order in which they came."""

    def __init__(self) -> None:
        self._all: tuple[Observer, ...] = ()
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        return bool(self._all)

    def __call__(self, experts: PackedExperts, ids_TK: torch.Tensor) -> None:
        """Tell them of one call."""
        if self._all:  # most of the time there is none, and each call of each layer comes here
            for observer in self._all:
                observer(experts, ids_TK)

    @contextlib.contextmanager
    def added(self, observer: Observer) -> Iterator[None]:
        """Have one more for a while."""
        with self._lock:
            self._all = (*self._all, observer)
        try:
            yield
        finally:
            with self._lock:
                self._all = tuple(other for other in self._all if other is not observer)


observe = Observers()
observing = observe.added
