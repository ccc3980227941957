"""The Triton kernels compute the right thing: their checks, in Triton's interpreter and on a GPU if there is one.

Triton decides when it is imported whether it interprets, hence a process for each.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import run_python

CHECKS = sorted((Path(__file__).parent / "triton_checks").glob("*_checks.py"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_in_the_interpreter(checks: Path) -> None:
    run(checks, "1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_on_the_gpu(checks: Path) -> None:
    run(checks, "0")


def test_nothing_else_pays_for_them() -> None:
    run_python(
        "import sys, ktcompile, ktcompile.runtime.devices;"
        "assert not {'ktcompile.ops.triton', 'ktcompile.runtime.cuda'} & set(sys.modules)"
    )


def run(checks: Path, interpret: str) -> None:
    # The interpreter's products are numpy's. OpenBLAS for Haswell sums a row of a product otherwise where it stands
    # elsewhere, which no GPU does; for Sandy Bridge it does not.
    variables = os.environ | {"TRITON_INTERPRET": interpret, "OPENBLAS_CORETYPE": "Sandybridge"}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
