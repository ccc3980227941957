"""No code of one instruction set reaches another: the linker merges functions of the same name, and would have a plain
CPU run AVX-512."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ktcompile import _native

ROOT = Path(__file__).parents[1]
VECTORS = re.compile(r"%[yz]mm\d")

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 instruction sets"),
    pytest.mark.skipif(not (shutil.which("nm") and shutil.which("objdump")), reason="needs nm and objdump"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    """The folder of the object libraries, of the newest build without sanitizers; built if there is none."""
    builds = [
        cache.parent
        for cache in (ROOT / "build").glob("*/CMakeCache.txt")
        if "KT_SANITIZE:BOOL=OFF" in cache.read_text() and object_of(cache.parent / "native/CMakeFiles", "scalar")
    ]
    if not builds:
        if not shutil.which("cmake"):
            pytest.skip("no build to look at, and no cmake to make one")
        builds = [tmp_path_factory.mktemp("build")]
        configure = ["cmake", "-S", ROOT, "-B", builds[0], "-DKT_PYTHON=OFF"]
        for command in (configure, ["cmake", "--build", builds[0], "--parallel", "2"]):
            subprocess.run(command, check=True, capture_output=True, timeout=300)
    return max(builds, key=lambda b: (b / "CMakeCache.txt").stat().st_mtime) / "native/CMakeFiles"


def object_of(folder: Path, isa: str) -> Path | None:
    return next(folder.glob(f"kt_isa_{isa}.dir/isa/*.o"), None)


def isa_objects(folder: Path) -> dict[str, Path]:
    found = {p.name[len("kt_isa_") : -len(".dir")]: p for p in folder.glob("kt_isa_*.dir")}
    return {isa: next(path.glob("isa/*.o")) for isa, path in found.items()}


def defined_symbols(path: Path) -> list[str]:
    command = ["nm", "--extern-only", "--defined-only", "--demangle", "--format=posix", path]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [re.sub(r" [A-Za-z] [0-9a-f]+( [0-9a-f]+)?$", "", line) for line in output.splitlines()]


def functions_with(path: Path, pattern: re.Pattern[str]) -> set[str]:
    """Names of the functions in whose code the pattern occurs."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, function = set(), ""
    for line in output.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif pattern.search(line):
            found.add(function)
    return found


def test_every_isa_has_an_object(objects):
    assert set(isa_objects(objects)) == set(_native.isas())


def test_each_isa_exports_its_kernel_table_and_nothing_else(objects):
    for isa, path in isa_objects(objects).items():
        # The compiler's pointer to the unwinder is no code.
        symbols = [s for s in defined_symbols(path) if s != "DW.ref.__gxx_personality_v0"]
        assert symbols == [f"kt::{isa}::kernels"], isa


def test_code_for_any_cpu_has_no_wide_vectors(objects):
    plain = [*objects.glob("kt_core_objects.dir/src/*.o"), *objects.glob("_native.dir/bind/*.o")]
    assert len(plain) >= 5
    for path in (*plain, *(isa_objects(objects)[isa] for isa in ("scalar", "amx_emu"))):
        # `executes` tries an instruction in a child process, on purpose.
        found = {f for f in functions_with(path, VECTORS) if not f.startswith("kt::executes(")}
        assert not found, f"{path.name}: {found}"


# What an instruction set does not have: code that the compiler might use were it given a flag too many.
AVX512 = r"%zmm\d|%[xy]mm(1[6-9]|2\d|3[01])|\{%k\d\}"
TILES, VNNI, VBMI = "%tmm|tilerelease|ldtilecfg", "vpdp(bu|ws)", r"vperm[bit]+2?b|vpmultishiftqb"
LACKS = {
    "avx2": (AVX512, VNNI, TILES),
    "avx2_vnni": (AVX512, TILES),
    "avx512": (VNNI, "vdpbf16ps", VBMI, TILES),
    "avx512_vnni": ("vdpbf16ps", VBMI, TILES),
    "avx512_bf16": (TILES,),
    "amx": ("vdpbf16ps",),
}


@pytest.mark.parametrize("isa", LACKS)
def test_an_isa_has_nothing_of_a_better_one(objects, isa):
    for pattern in LACKS[isa]:
        assert not functions_with(isa_objects(objects)[isa], re.compile(pattern)), pattern


def test_each_isa_uses_what_it_is_for(objects):
    isas = isa_objects(objects)
    for isa, pattern in (
        ("avx2", "vfmadd.*%ymm"),
        ("avx2", "vpmaddubsw.*%ymm"),
        ("avx2_vnni", r"\{vex\} vpdpbusd.*%ymm"),
        ("avx512", "vfmadd.*%zmm"),
        ("avx512", "vpmaddubsw.*%zmm"),
        ("avx512_vnni", "vpdpbusd.*%zmm"),
        ("avx512_bf16", "vdpbf16ps.*%zmm"),
        ("amx", "tdpbf16ps.*%tmm"),
        ("amx", "tdpbusd.*%tmm"),
    ):
        assert functions_with(isas[isa], re.compile(pattern)), f"{isa}: {pattern}"


def test_a_leak_would_be_found(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("needs a compiler")
    source, path = tmp_path / "leak.cpp", tmp_path / "leak.o"
    source.write_text(
        "inline void scale(float* p) { for (int i = 0; i < 64; ++i) p[i] *= 2; }\n"
        "namespace kt { void (*kernels)(float*) = scale; }\n"
    )
    subprocess.run([compiler, "-O3", "-mavx2", "-c", source, "-o", path], check=True)
    assert set(defined_symbols(path)) == {"kt::kernels", "scale(float*)"}
    assert functions_with(path, VECTORS) == {"scale(float*)"}
