"""What `import ktcompile` loads, and when transformers knows of "kt"."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from ktcompile.models.traced import run_as_traced

_PROGRAM = """
import json, sys
import ktcompile
loaded = [name for name in ("transformers", "torch._dynamo", "torch._inductor", "triton") if name in sys.modules]
from transformers.modeling_utils import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
known = ["kt" in AttentionInterface(), "kt_paged" in AttentionInterface(), "kt" in ALL_EXPERTS_FUNCTIONS]
module = sys.modules["transformers.modeling_utils"]
own = [type(x).__module__.startswith("ktcompile") for x in (*sys.meta_path, module.__loader__, module.__spec__.loader)]
print(json.dumps([loaded, known, any(own)]))
"""


def test_importing_loads_neither_transformers_nor_compilers_and_registers_with_what_comes_later() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], [True, True, True], False]


def test_a_traced_function_is_marked_as_torch_marks_one() -> None:
    def ours() -> None: ...
    def theirs() -> None: ...

    assert vars(run_as_traced(ours)) == vars(torch.compiler.assume_constant_result(theirs))
