"""The machine code of the kernels on tiles: the compiler has dropped no store, and the loops are what is written.

The compiler does not know the instructions; what it knows of their memory, it knows from the operands in tile_hw.h.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.compiler import AVX512, COMPILER, IS_X86, ROOT, compile_native

pytestmark = [
    pytest.mark.skipif(not IS_X86, reason="x86 instructions"),
    pytest.mark.skipif(not (COMPILER and shutil.which("objdump")), reason="needs a compiler and objdump"),
]

KERNELS = {"bf16": "tdpbf16ps", "int8": "tdpbusd"}
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*([^#<]*)")
STORE = re.compile(r"^(\S+),(-?0x[0-9a-f]+)?\((%\w+)\)$")
# [1, 2, 4, 8] bytes
INTEGER_REGISTERS = [
    *([f"{x}l", f"{x}x", f"e{x}x", f"r{x}x"] for x in "abcd"),
    *([f"{x}l", x, f"e{x}", f"r{x}"] for x in ("si", "di", "bp")),
    *([f"r{i}b", f"r{i}w", f"r{i}d", f"r{i}"] for i in range(8, 16)),
]
WIDTH = {f"%{name}": 2**i for names in INTEGER_REGISTERS for i, name in enumerate(names)}
WIDTH_OF_PART = {"movd": 4, "movq": 8, "movlps": 8, "movhps": 8, "movlpd": 8, "movhpd": 8}
WIDTH_OF_VECTOR = {"%x": 16, "%y": 32, "%z": 64}
WIDTH_OF_IMMEDIATE = {"b": 1, "w": 2, "l": 4, "q": 8}


class Instruction(NamedTuple):
    address: int
    mnemonic: str
    operands: str


Listing = list[Instruction]


def disassemble(path: Path) -> dict[str, Listing]:
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", "--wide", path]
    functions: dict[str, Listing] = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.endswith(">:"):
            code = functions.setdefault(line.split("<", 1)[1][:-2], [])
        elif found := INSTRUCTION.match(line):
            code.append(Instruction(int(found[1], 16), found[2], found[3].strip()))
    return functions


def until(code: Listing, mnemonic: str) -> tuple[Listing, str]:
    """Return what comes before the first such instruction, and its operands."""
    at = [i.mnemonic for i in code].index(mnemonic)
    return code[:at], code[at].operands


def stored_bytes(code: Listing, base: str, begin: int) -> set[int]:
    """Return which of the 64 bytes from `begin` on, relative to register `base`, are stored to."""
    stored = set()
    for _, mnemonic, operands in code:
        found = STORE.match(operands)
        if found and found[3] == base and "mov" in mnemonic:
            offset = int(found[2] or "0", 16) - begin
            stored.update(range(offset, offset + width(mnemonic, found[1])))
    return stored & set(range(64))


def width(mnemonic: str, source: str) -> int:
    if source.startswith("$"):
        return WIDTH_OF_IMMEDIATE[mnemonic[-1]]
    if source in WIDTH:
        return WIDTH[source]
    return WIDTH_OF_PART.get(mnemonic.removeprefix("v"), WIDTH_OF_VECTOR[source[:2]])


def address(operand: str) -> tuple[str, int]:
    """Return base register and displacement of `-0x40(%rsp)`."""
    found = re.match(r"(-?0x[0-9a-f]+)?\((%\w+)", operand)
    assert found, operand
    return found[2], int(found[1] or "0", 16)


def bytes_configured(code: Listing) -> set[int]:
    before, operand = until(code, "ldtilecfg")
    return stored_bytes(before, *resolved(before, operand))


def bytes_loaded(code: Listing) -> set[int]:
    before, operand = until(code, "tileloadd")
    return stored_bytes(before, *resolved(before, operand))


def resolved(before: Listing, operand: str) -> tuple[str, int]:
    """Return base and displacement, of what the base was computed from if that was by `lea` or is a copy."""
    base, displacement = address(operand)
    for _, mnemonic, operands in reversed(before):
        if mnemonic == "lea" and operands.endswith(f",{base}"):
            base, more = address(operands)
            return base, displacement + more
        if mnemonic == "mov" and re.fullmatch(rf"%\w+,{base}", operands):
            return operands.split(",")[0], displacement
    return base, displacement


@pytest.fixture(scope="module", params=[(), AVX512], ids=["baseline", "avx512"])
def functions(request, tmp_path_factory) -> dict[str, Listing]:
    output = tmp_path_factory.mktemp("tiles") / "tiles_hw.o"
    return disassemble(compile_native(output, *request.param, "-c", ROOT / "native/tests/tiles_hw.cpp"))


def test_a_configuration_is_written_before_it_is_loaded(functions):
    assert bytes_configured(functions["hw_configure"]) == set(range(64))


def test_what_fills_memory_is_written_before_the_tile_is_loaded(functions):
    assert bytes_loaded(functions["hw_load"]) == set(range(64))


def test_a_lost_store_would_be_found(tmp_path):
    native = tmp_path / "native"
    for folder in ("include", "isa", "kernels", "tests"):
        shutil.copytree(ROOT / "native" / folder, native / folder)
    header = native / "isa/tile_hw.h"
    text = header.read_text()
    for operand, instead in (
        ('"ldtilecfg %0" : : "m"(config)', '"ldtilecfg (%0)" : : "r"(&config)'),
        (', "m"(*static_cast<const char (*)[]>(base))', ""),
    ):
        assert operand in text
        text = text.replace(operand, instead)
    header.write_text(text)
    source = native / "tests/tiles_hw.cpp"
    functions = disassemble(compile_native(tmp_path / "lost.o", "-c", source, native=native))
    assert bytes_configured(functions["hw_configure"]) == set()
    assert bytes_loaded(functions["hw_load"]) == set()


def kernel_code(functions: dict[str, Listing], name: str) -> Listing:
    """Return the code of the one function that multiplies: it may be a part of hw_gemm_*, or not."""
    found = [code for code in functions.values() if any(i.mnemonic == KERNELS[name] for i in code)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_configures_with_64_bytes(functions, name):
    assert bytes_configured(kernel_code(functions, name)) == set(range(64))


@pytest.mark.parametrize("name", KERNELS)
def test_the_loops_of_a_kernel(functions, name):
    """Sums stay in tiles; per step each tile is loaded once; nothing is stored."""
    product = KERNELS[name]
    two = ["load 6", "load 4", "load 7", "load 5", "046", "147", "256", "357"]
    one = ["load 6", "load 4", "load 7", "046", "147"]
    loops = loops_with(kernel_code(functions, name), product)
    found = sorted([tile_instructions(loop, product) for loop in loops], key=len)
    assert found in ([one, two], [one, one, two, two])  # the compiler may make others for when nothing is fetched
    # A line of what comes next, in a loop of its own.
    assert sum(Counter(i.mnemonic for i in loop)["prefetcht1"] for loop in loops) == 2
    for loop in loops:
        assert not [i for i in loop if STORE.match(i.operands)], "spills"


def loops_with(code: Listing, mnemonic: str) -> list[Listing]:
    """Return the loops in which there is such an instruction, and no smaller loop with one."""
    loops = []
    for jump in code:
        if jump.mnemonic.startswith("j") and re.fullmatch("[0-9a-f]+", jump.operands):
            loop = [i for i in code if int(jump.operands, 16) <= i.address <= jump.address]
            if any(i.mnemonic == mnemonic for i in loop):
                loops.append(loop)
    return [loop for loop in loops if not any(other != loop and set(other) <= set(loop) for other in loops)]


def tile_instructions(code: Listing, product: str) -> list[str]:
    names = []
    for _, mnemonic, operands in code:
        numbers = re.findall(r"%tmm(\d)", operands)
        if mnemonic == product:
            names.append("".join(reversed(numbers)))
        elif mnemonic == "tileloadd":
            names.append(f"load {numbers[0]}")
    return names


@pytest.mark.parametrize("name", KERNELS)
def test_counts_of_a_kernel(functions, name):
    code = kernel_code(functions, name)
    counts = Counter(i.mnemonic for i in code if i.mnemonic.startswith(("tile", "td", "ldtile")))
    counts.pop("tilerelease", None)  # here, or in what calls this
    # One and two tiles of rows: two and four tiles of sums, zeroed or loaded, then stored. Loops may be there twice.
    copies = counts[KERNELS[name]] // (2 + 4)
    assert copies in (1, 2) and counts == {
        "ldtilecfg": 1,
        "tilezero": 2 + 4,
        "tileloadd": (2 + 4) + copies * (3 + 4),
        KERNELS[name]: copies * (2 + 4),
        "tilestored": 2 + 4,
    }
    assert any(i.mnemonic == "tilerelease" for i in functions[f"hw_gemm_{name}"])
