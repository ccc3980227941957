"""The threads that run native kernels: one pool for the process."""

from __future__ import annotations

import ctypes
import functools
import os
import threading

from ktcompile import _native, env, openmp
from ktcompile.machine import machine

_IMPORTED_BY = os.getpid()


class NativeThreads:
    """Holds the native context. It is made at the first use, and anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = env.read().num_threads or machine().cores
        self._context: _native.Context | None = None
        os.register_at_fork(after_in_child=self._forked)

    def context(self) -> _native.Context:
        """Return the context; its threads sleep while no kernel runs."""
        context = self._context
        if context is None:
            with self._lock:
                if os.getpid() == _IMPORTED_BY:
                    openmp.share_threads()
                context = self._context = self._context or _native.Context(self._count)
        return context

    @property
    def count(self) -> int:
        return self._count

    def resize(self, count: int) -> None:
        with self._lock:
            self._count = count
            self._context = None

    def _forked(self) -> None:
        # The threads of the parent do not exist here, so its context can be neither used nor destroyed.
        if self._context is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))
        _native.use_openmp(0, 0, 0, 0)  # nor do those of OpenMP
        self._lock = threading.Lock()
        self._context = None


@functools.cache
def native_threads() -> NativeThreads:
    """Return the threads of this process."""
    return NativeThreads()


def set_num_threads(count: int) -> None:
    """Run native kernels on `count` threads. The default is one for each physical core, or
    KTCOMPILE_NUM_THREADS. Results do not depend on it. ValueError: `count` is below 1."""
    if type(count) is not int or count < 1:
        raise ValueError(f"the number of threads is {count!r}; it must be a whole number of 1 or more")
    native_threads().resize(count)


def get_num_threads() -> int:
    """Return the number of threads that run native kernels."""
    return native_threads().count
