"""Kernels run on torch's threads, which spin briefly."""

from __future__ import annotations

import pytest
from helpers.processes import run_python

from ktcompile import openmp

needs_a_runtime = pytest.mark.skipif(openmp.runtime_library() is None, reason="torch has no OpenMP runtime here")

KERNELS_RUN = """
import os, torch, ktcompile
from pathlib import Path
from ktcompile.ops.threads import native_threads

def threads():
    return {task.name: sum(map(int, (task / "stat").read_text().rsplit(")", 1)[1].split()[11:13]))
            for task in Path("/proc/self/task").iterdir()}

torch.set_num_threads(3)
ktcompile.set_num_threads(KERNEL_THREADS)
torch.randn(1 << 20).add_(1)  # torch's threads are there
experts = ktcompile.ops.pack_experts(torch.randn(4, 256, 256), torch.randn(4, 256, 128))
inputs = torch.randn(64, 256), torch.randint(4, (64, 2)), torch.rand(64, 2)
before = set(threads())
native_threads().context()
own = set(threads()) - before
assert len(own) == KERNEL_THREADS - 1
wanted = ktcompile.ops.moe(*inputs, experts)
for _ in range(400):
    assert torch.equal(ktcompile.ops.moe(*inputs, experts), wanted)
after = threads()
ticks = sum(after[name] for name in own)
"""


@needs_a_runtime
def test_kernels_run_on_torchs_threads():
    run_python(KERNELS_RUN.replace("KERNEL_THREADS", "3") + "assert ticks == 0, ticks", timeout=120)


@needs_a_runtime
def test_kernels_run_on_their_own_threads_where_torch_has_another_number():
    run_python(KERNELS_RUN.replace("KERNEL_THREADS", "4") + "assert ticks > 0", timeout=120)


def test_the_environment_is_as_it_was():
    run_python("import os, ktcompile; assert 'GOMP_SPINCOUNT' not in os.environ")
