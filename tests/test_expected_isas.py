"""The instruction sets of this CPU, by the kernel's account, are those that the native module finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktcompile import _native

CPUINFO = Path("/proc/cpuinfo")
NEEDS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}


@pytest.mark.skipif(not CPUINFO.exists(), reason="Linux alone says what its CPU has")
def test_all_that_the_cpu_has_is_found() -> None:
    flags = next(set(line.split()) for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    expected = {isa for isa, needed in NEEDS.items() if needed <= flags}
    assert set(_native.isas_for(_native.cpu_features())) == expected


def test_the_build_has_every_instruction_set() -> None:
    assert set(_native.isas()) == set(NEEDS)
