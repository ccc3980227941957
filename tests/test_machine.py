"""What the machine is, and what KTCOMPILE_ISA and KTCOMPILE_FEATURES make of it."""

from __future__ import annotations

import importlib
import os
import re

import pytest
from helpers.processes import run_python

from ktcompile import _native
from ktcompile.machine import Machine, check_isa, machine

# What runs on any CPU, best first; the second is never chosen by itself.
EVERYWHERE = ("scalar", "amx_emu")
# The same bits but for AMX, so that the faster may be taken, by measurement.
SAME_ARITHMETIC = {"avx512_bf16", "avx512_vnni"}


@pytest.fixture
def machine_with(monkeypatch):
    """A function that reads the machine anew under given variables."""

    def read(isa: str | None = None, features: str | None = None) -> Machine:
        for name, value in (("KTCOMPILE_ISA", isa), ("KTCOMPILE_FEATURES", features)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        return machine.__wrapped__()

    return read


def test_facts_are_plausible(machine_with):
    m = machine_with()
    assert m.cpu and set(EVERYWHERE) <= set(m.isas) and m.isa in m.isas
    assert 1 <= m.cores <= m.cpus == len(os.sched_getaffinity(0))
    assert m.numa_nodes >= 1 and m.memory_bytes > 2**28
    assert set(m.isas) <= set(_native.isas())
    assert machine() is machine()


@pytest.mark.parametrize(
    "has_memory, cpulists, cpus, nodes",
    [
        ("0-1", ["0,2", "1,3"], {0, 1, 2, 3}, 2),
        ("0-1", ["0,2", "1,3"], {0, 2}, 1),
        ("0-2", ["0-1", "2-3", ""], {0, 3}, 2),
        ("0", ["0-1", "2-3"], {2, 3}, 1),
        ("0-1", ["0-1"], {0, 1}, 1),
        ("junk", ["0", "1"], {0, 1}, 1),
        (None, ["0", "1"], {0, 1}, 1),
    ],
    ids=["two", "of one no CPU is allowed", "memory alone", "CPUs alone", "no such node", "junk", "no list"],
)
def test_numa_nodes(tmp_path, monkeypatch, has_memory, cpulists, cpus, nodes):
    if has_memory is not None:
        (tmp_path / "has_memory").write_text(f"{has_memory}\n")
    for node, cpulist in enumerate(cpulists):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}/cpulist").write_text(f"{cpulist}\n")
    monkeypatch.setattr("ktcompile.machine._SYS_NODE", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cpus)
    assert machine.__wrapped__().numa_nodes == nodes


def test_the_best_isa_is_chosen(machine_with):
    m = machine_with()
    assert m.isa == m.isas[0] or {m.isa, m.isas[0]} == SAME_ARITHMETIC


def test_each_isa_can_be_forced(machine_with):
    for isa in machine_with().isas:
        assert machine_with(isa=isa).isa == isa


def test_an_unknown_isa(machine_with):
    with pytest.raises(ValueError, match=r"ISA 'avx9' is unknown; this build has .*scalar"):
        machine_with(isa="avx9")


def test_an_isa_that_the_machine_lacks(machine_with):
    hidden = ",".join(f"-{name}" for name in _native.cpu_features())
    assert machine_with(features=hidden).isas == EVERYWHERE
    assert machine_with(features=hidden).isa == "scalar"
    for isa in set(_native.isas()) - set(EVERYWHERE):
        with pytest.raises(ValueError, match=f"ISA '{isa}' does not run on this machine, which has scalar, amx_emu"):
            machine_with(isa=isa, features=hidden)
        with pytest.raises(ValueError, match=f"'{isa}'"):
            check_isa(isa, EVERYWHERE)


NEEDED_BY = {
    "avx2": {"avx2", "avx2_vnni"},
    "avx_vnni": {"avx2_vnni"},
    "avx512": {"avx512", "avx512_vnni", "avx512_bf16", "amx"},
    "avx512_vnni": {"avx512_vnni", "avx512_bf16", "amx"},
    "avx512_vbmi": {"avx512_bf16", "amx"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_bf16": {"amx"},
    "amx_int8": {"amx"},
}


def test_hidden_features_hide_their_isas(machine_with):
    whole = machine_with()
    for feature in whole.features:
        rest = machine_with(features=f"-{feature}")
        assert rest.features == tuple(f for f in whole.features if f != feature)
        assert set(rest.isas) <= set(whole.isas)
    for feature, isas in NEEDED_BY.items():
        if feature in whole.features:
            assert set(whole.isas) - set(machine_with(features=f"-{feature}").isas) == isas & set(whole.isas), feature


def test_a_feature_that_is_there_can_be_added(machine_with):
    for feature in machine_with().features:
        assert machine_with(features=f"+{feature}") == machine_with()


def test_a_feature_that_the_cpu_does_not_execute(machine_with):
    missing = [f for f in ("amx_int8", "amx_bf16", "avx_vnni") if not _native.executes([f])]
    for feature in missing:
        with pytest.raises(ValueError, match=re.escape(f"'+{feature}', which this CPU does not execute")):
            machine_with(features=f"+{feature}")


@pytest.mark.parametrize("change", ["+avx521", "-avx521", "+", "-"])
def test_an_unknown_feature(machine_with, change):
    with pytest.raises(ValueError, match=re.escape(f"KTCOMPILE_FEATURES has {change!r}: no CPU feature is called")):
        machine_with(features=change)


def test_selection_takes_features_alone():
    assert _native.select_isa([]) == "scalar" and tuple(_native.isas_for([])) == EVERYWHERE
    assert _native.isas_for(["avx2"]) == ["avx2", *EVERYWHERE]
    assert _native.isas_for(["avx2", "avx_vnni"]) == ["avx2_vnni", "avx2", *EVERYWHERE]
    assert "avx512_bf16" not in _native.isas_for(["avx512"]) and "avx512_bf16" not in _native.isas_for(["avx512_bf16"])
    for features in (["avx2"], ["avx2", "avx_vnni"], ["avx2", "avx512"], ["avx2", "avx512", "avx512_vnni"]):
        if set(features) <= set(_native.cpu_features()):
            assert _native.select_isa(features) == features[-1].replace("avx_vnni", "avx2_vnni")


PROGRAM = """
import torch, ktcompile
from ktcompile.machine import machine
torch.manual_seed(0)
experts = ktcompile.ops.pack_experts(torch.randn(4, 64, 48).bfloat16(), torch.randn(4, 48, 32).bfloat16())
out = ktcompile.ops.moe(torch.randn(9, 48).bfloat16(), torch.randint(4, (9, 2)), torch.rand(9, 2), experts)
print(experts.isa, ",".join(machine().isas), out.float().double().sum().item(), out.float().square().sum().item())
"""


@pytest.mark.skipif("avx512" not in machine().isas, reason="needs an ISA to hide")
def test_variables_reach_the_kernels():
    isa, _, *numbers = run_python(PROGRAM, env={"KTCOMPILE_ISA": "scalar"}).split()
    assert isa == "scalar"
    hidden = "-amx_bf16"
    for feature in ("avx512_bf16", "avx512"):
        hidden += f",-{feature}"
        rest = [i for i in machine().isas if not any(i in NEEDED_BY[f] for f in re.findall(r"\w+", hidden))]
        isa, isas, *same = run_python(PROGRAM, env={"KTCOMPILE_FEATURES": hidden}).split()
        assert isa == rest[0] and isas == ",".join(rest) and same == numbers


@pytest.mark.skipif(not _native.executes(["avx512_bf16"]), reason="this CPU does not execute AVX512-BF16")
def test_a_feature_that_the_cpu_hides_can_be_added_and_gives_the_same_bits():
    variables = {"KTCOMPILE_FEATURES": "+avx512_bf16", "KTCOMPILE_ISA": "avx512_bf16"}
    isa, isas, *numbers = run_python(PROGRAM, env=variables).split()
    assert isa == "avx512_bf16" and "avx512_bf16,avx512_vnni,avx512," in isas
    assert run_python(PROGRAM, env={"KTCOMPILE_ISA": "scalar"}).split()[2:] == numbers


def test_cpus_of_one_name_are_told_apart(tmp_path, monkeypatch):
    # The package has a function of that name.
    module = importlib.import_module("ktcompile.machine")
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "_CPUINFO", file)
    file.write_text(
        "processor\t: 0\ncpu family\t: 23\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t: 2\n"
    )
    assert module._cpu_name() == "AMD EPYC (family 23, model 1)"
    file.write_text("model name : X Y \n")
    assert module._cpu_name() == "X Y"
    file.write_text("cpu : other\n")
    assert module._cpu_name()


def test_a_pool_has_a_thread_or_more():
    for count in (0, -3):  # in a process of its own, which ends where it is not refused
        program = f"from ktcompile import _native\ntry: _native.Context({count})\nexcept ValueError as e: print(e)"
        assert run_python(program).strip() == f"threads is {count}; it must be 1 or more"
