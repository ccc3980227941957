"""The instruction sets of this CPU, by the kernel's account, are those that the native module finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktcompile import _native

CPUINFO = Path("/proc/cpuinfo")
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = {*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"}
# By the names of Linux.
NEEDS = {
    "amx": {*AVX512, "avx512_vnni", "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": {*AVX512, "avx512_vnni", "avx512vbmi", "avx512_bf16"},
    "avx512_vnni": {*AVX512, "avx512_vnni"},
    "avx512": AVX512,
    "avx2_vnni": {*AVX2, "avx_vnni"},
    "avx2": AVX2,
    "scalar": set(),
    "amx_emu": set(),
}


@pytest.mark.skipif(not CPUINFO.exists(), reason="Linux alone says what its CPU has")
def test_all_that_the_cpu_has_is_found() -> None:
    flags = next(set(line.split()) for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    expected = [isa for isa, needed in NEEDS.items() if needed <= flags]
    assert _native.isas_for(_native.cpu_features()) == expected


def test_the_build_has_every_instruction_set() -> None:
    assert _native.isas() == list(NEEDS)
