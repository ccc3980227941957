"""The kernels on tiles, emulated and as machine code of which each tile instruction is emulated."""

from __future__ import annotations

import subprocess

import pytest
from helpers.compiler import AVX512, COMPILER, IS_X86, ROOT, compile_native, cpu_has

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a compiler")

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        pytest.param((), (), id="baseline"),
        pytest.param(AVX512, ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"), id="avx512"),
        pytest.param(SANITIZE, (), id="sanitizers"),
    ],
)
def test_native_tests_of_tiles(tmp_path, flags, needs):
    if not cpu_has(*needs):
        pytest.skip(f"the processor lacks one of {', '.join(needs)}")
    sources = [ROOT / "native/tests/tiles.cpp", *([ROOT / "native/tests/tiles_hw.cpp"] if IS_X86 else [])]
    program = compile_native(tmp_path / "tile_tests", *flags, *sources)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " checks" in result.stdout
