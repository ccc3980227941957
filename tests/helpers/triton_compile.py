"""Kernels compiled for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ktcompile.ops.triton.launch import INTERPRET, Launch

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a block of threads may have, in bytes.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
# Those for tiles of 64 rows and more; tiles of fewer have `mma.sync` on every NVIDIA target.
_MATRIX_INSTRUCTIONS = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "sm_120": r"mma\.sync",
    "gfx942": r"v_mfma",
}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a launch. spilled: bytes that a thread keeps in memory for want of registers."""

    assembly: str
    matrix_instructions: int
    registers: int
    spilled: int
    shared: int


def compile_for(launch: Launch, name: str) -> Compiled:
    """Return the kernel compiled for the target of this name, with the arguments specialised as at a launch."""
    constants: dict[str, Any] = dict(launch.constants)
    if INTERPRET in launch.kernel.arg_names:
        constants[INTERPRET] = False
    signature, attributes = {}, {}
    for i, (argument, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params, strict=True)):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        value = launch.arguments[i]
        if parameter.do_not_specialize:
            signature[argument] = _type(value)
            continue
        if isinstance(value, int) and value == 1:
            signature[argument], constants[argument] = "constexpr", 1
            continue
        signature[argument] = _type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[name], options=launch.options)
    assembly = compiled.asm["amdgcn" if name.startswith("gfx") else "ptx"]
    registers, spilled = (
        _resources_amd(assembly) if name.startswith("gfx") else _resources_nvidia(compiled.asm["cubin"])
    )
    is_narrow = launch.constants.get("M", launch.constants.get("BLOCK_M", 0)) < 64
    pattern = _MATRIX_INSTRUCTIONS["sm_80" if is_narrow and name.startswith("sm") else name]
    matrix = len(re.findall(pattern, assembly))
    return Compiled(assembly, matrix, registers, spilled, compiled.metadata.shared)


def _type(value: torch.Tensor | int | float) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def _resources_nvidia(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread and bytes of its stack, where what is spilled lies."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _resources_amd(assembly: str) -> tuple[int, int]:
    """Return vector registers of a thread and bytes of its private segment."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly))
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
