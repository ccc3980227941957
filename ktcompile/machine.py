"""What this machine is: instruction sets, cores, memory, NUMA nodes, GPUs."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ktcompile import _native, env

_SYS_CPU = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_SYS_NODE = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about this machine.

    cpu: model name, with family and number. features: CPU features that kernels may use, after KTCOMPILE_FEATURES.
    isas: instruction sets whose kernels run here, best first. isa: the one that is used.
    cpus: logical CPUs that this process may use. cores: physical cores among them.
    numa_nodes: NUMA nodes with memory and with CPUs among them. memory_bytes: physical memory. gpus: their names.
    """

    cpu: str
    features: tuple[str, ...]
    isas: tuple[str, ...]
    isa: str
    cpus: int
    cores: int
    numa_nodes: int
    memory_bytes: int
    gpus: tuple[str, ...]


@functools.cache
def machine() -> Machine:
    """Return the facts about this machine, read once.

    ValueError: KTCOMPILE_ISA or KTCOMPILE_FEATURES name what this machine or this build lacks.
    """
    settings = env.read()
    features = _features(settings.features)
    isas = tuple(_native.isas_for(list(features)))
    return Machine(
        cpu=_cpu_name(),
        features=features,
        isas=isas,
        isa=check_isa(settings.isa, isas) if settings.isa else _native.select_isa(list(features)),
        cpus=len(os.sched_getaffinity(0)),
        cores=_physical_cores(os.sched_getaffinity(0)),
        numa_nodes=_numa_nodes(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpus(),
    )


def check_isa(isa: str, available: tuple[str, ...]) -> str:
    """Return `isa`. ValueError: this build has no such kernels, or this machine cannot run them."""
    if isa not in _native.isas():
        raise ValueError(f"ISA {isa!r} is unknown; this build has {', '.join(_native.isas())}")
    if isa not in available:
        raise ValueError(f"ISA {isa!r} does not run on this machine, which has {', '.join(available)}")
    return isa


def _features(changes: tuple[str, ...]) -> tuple[str, ...]:
    features = list(_native.cpu_features())
    for change in changes:
        name = change[1:]
        try:
            _native.isas_for([name])
        except ValueError as error:
            raise ValueError(f"KTCOMPILE_FEATURES has {change!r}: {error}") from None
        if change[0] == "-":
            features = [f for f in features if f != name]
        elif name not in features:
            if not _native.executes([name]):
                raise ValueError(f"KTCOMPILE_FEATURES has {change!r}, which this CPU does not execute")
            features.append(name)
    return tuple(features)


def _cpu_name() -> str:
    """Return the model's name with its family and number: hypervisors give CPUs of all generations one name."""
    try:
        first = _CPUINFO.read_text().split("\n\n")[0]
    except OSError:
        first = ""
    facts: dict[str, str] = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(\S.*?)\s*$", first, re.MULTILINE))
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return facts["model name"] + (f" ({', '.join(numbers)})" if numbers else "")


def _physical_cores(cpus: set[int]) -> int:
    """Count cores, not hardware threads: two threads of a core share its multipliers."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((_SYS_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            return len(cpus)
    return len(cores)


def _numa_nodes(cpus: set[int]) -> int:
    """Count nodes with memory that own one of `cpus`: memory alone (CXL, HBM) has no threads that could work on it.

    1 where /sys does not say. The native code also gives CPUs of nodes without memory to their nearest neighbour.
    """
    try:
        with_memory = _cpu_list((_SYS_NODE / "has_memory").read_text())
        nodes = [n for n in with_memory if cpus & _cpu_list((_SYS_NODE / f"node{n}/cpulist").read_text())]
    except (OSError, ValueError):
        return 1
    return max(1, len(nodes))


def _cpu_list(text: str) -> set[int]:
    """Return the numbers in a list as Linux writes it: "0-3,8"."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in result.stdout.splitlines() if line.strip())
