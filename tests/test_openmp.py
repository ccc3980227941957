"""Kernels run on torch's threads, which spin briefly."""

from __future__ import annotations

import pytest
from helpers.processes import run_python

from ktcompile import openmp

needs_a_runtime = pytest.mark.skipif(openmp.runtime_library() is None, reason="torch has no OpenMP runtime here")

KERNELS_RUN = """
import time, torch, ktcompile
from pathlib import Path
from ktcompile.ops.threads import native_threads

def sleeps():
    # How often each thread has gone to sleep.
    status = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            status[task.name] = (task / "status").read_text()
        except FileNotFoundError:
            pass  # of another library, and it has just ended
    return {name: int(text.split("voluntary_ctxt_switches:", 1)[1].split()[0]) for name, text in status.items()}

torch.set_num_threads(3)
ktcompile.set_num_threads(KERNEL_THREADS)
torch.randn(1 << 20).add_(1)  # torch's threads are there
experts = ktcompile.ops.pack_experts(torch.randn(4, 256, 256), torch.randn(4, 256, 128))
inputs = torch.randn(64, 256), torch.randint(4, (64, 2)), torch.rand(64, 2)
others = set(sleeps())
native_threads().context()
wanted = ktcompile.ops.moe(*inputs, experts)  # checks the layer, too
before = {}
while (now := {name: count for name, count in sleeps().items() if name not in others}) != before:
    before = now
    time.sleep(1)  # until all are asleep
assert len(before) == KERNEL_THREADS - 1
for _ in range(100):
    assert torch.equal(ktcompile.ops.moe(*inputs, experts), wanted)
time.sleep(0.2)
after = sleeps()
woken = [after[name] > count for name, count in before.items()]
"""


@needs_a_runtime
def test_kernels_run_on_torchs_threads():
    run_python(KERNELS_RUN.replace("KERNEL_THREADS", "3") + "assert not any(woken)", timeout=120)


@needs_a_runtime
def test_kernels_run_on_their_own_threads_where_torch_has_another_number():
    run_python(KERNELS_RUN.replace("KERNEL_THREADS", "4") + "assert all(woken)", timeout=120)


def test_the_environment_is_as_it_was():
    run_python("import os, ktcompile; assert 'GOMP_SPINCOUNT' not in os.environ")
