"""Single native sources, compiled as the project compiles them."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")


def compile_native(output: Path, *arguments: str | Path, native: Path = ROOT / "native") -> Path:
    """Return `output`, compiled from the sources among `arguments`. AssertionError, with the compiler's messages."""
    result = try_compile("-I", native / "include", *arguments, "-o", output)
    assert result.returncode == 0, result.stderr
    return output


def try_compile(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Return what the compiler says about `arguments`, to which the project's flags are added."""
    assert COMPILER
    command = [COMPILER, *FLAGS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def cpu_has(*flags: str) -> bool:
    """Return whether Linux lists all of these features for the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and set(flags) <= set(cpuinfo.read_text().split())
