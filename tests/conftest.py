"""Set-up of every test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

# Where other programs run too, torch's threads would wait for each other by spinning, a time slice at each step of the
# reference. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A test that wants packed models kept names a folder.
os.environ["KTCOMPILE_PACKED_CACHE"] = "off"

import torch

import ktcompile
from ktcompile.machine import machine


def pytest_configure(config: pytest.Config) -> None:
    """Fail before the first test where an instruction set that must be there is not."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(2 if workers == 1 else 1)  # workers share the cores
    expected = [isa for isa in os.environ.get("KTCOMPILE_EXPECT_ISAS", "").split(",") if isa]
    missing = [isa for isa in expected if isa not in machine().isas]
    if missing:
        found = ", ".join(machine().isas)
        pytest.exit(f"KTCOMPILE_EXPECT_ISAS names {', '.join(missing)}, but only {found} run here", returncode=4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take a minute each, or one process has them when the others have ended."""
    items.sort(key=lambda item: item.path.name != "test_triton_kernels.py")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Give `set_num_threads`, and restore the numbers of native threads and of torch's afterwards."""
    before, torch_before = ktcompile.get_num_threads(), torch.get_num_threads()
    yield ktcompile.set_num_threads
    ktcompile.set_num_threads(before)
    torch.set_num_threads(torch_before)


@pytest.fixture
def one_torch_thread(threads: Callable[[int], None]) -> None:
    """For tensors so small that threads only wait for each other."""
    torch.set_num_threads(1)
