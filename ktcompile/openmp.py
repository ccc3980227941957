"""The OpenMP threads of torch: how long they spin, and kernels of ours on them.

After each of its operations torch's threads spin, by default for milliseconds. Threads of our own would share their
cores with them: a step of decode then takes 1.5 to 2 times as long on a machine where nothing else runs. So kernels run
on the same threads. Where something else does run, a thread that spins wastes its time slices, hence a shorter spin.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktcompile import _native

# Rounds of libgomp's loop, well over what lies between two operations of a model and a fraction of its 300,000.
_SPINS = "10000"
_SAID_ALREADY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")


@contextmanager
def _short_spins() -> Iterator[None]:
    """Have the runtime, which reads the environment as it is loaded, spin briefly, unless the environment says how."""
    if any(name in os.environ for name in _SAID_ALREADY):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]  # what this process starts has its own


if "torch" not in sys.modules:
    with _short_spins():
        import torch  # noqa: F401


@functools.cache
def share_threads() -> None:
    """Have kernels run on torch's threads from now on, whenever there are as many as kernels are to use.

    Where the runtime is not found nothing changes.
    """
    if library := runtime_library():
        runtime = ctypes.CDLL(library)
        functions = [getattr(runtime, name, None) for name in _FUNCTIONS]
        addresses = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions if f is not None]
        if len(addresses) == len(_FUNCTIONS):
            _native.use_openmp(*addresses)


def runtime_library() -> str | None:
    """Return the file of the OpenMP runtime that is in the process: torch's own, or the only one."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in mapped if "/" in line}
    found = sorted(file for file in files if Path(file).name.startswith(_RUNTIMES))
    folder = str(Path(sys.modules["torch"].__file__ or "").parent)  # or torch.libs beside it
    own = [file for file in found if file.startswith(folder)]
    return own[0] if own else found[0] if len(found) == 1 else None
