"""`ktc doctor`: what this machine is, how fast it is, and whether every kernel computes the right thing."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ktcompile.machine import Machine
    from ktcompile.runtime.self_check import KernelCheck

_EXAMPLES = """\
examples:
  ktc doctor
  ktc doctor --quick --json > machine.json
  KTCOMPILE_ISA=avx2 ktc doctor

The exit status is 0 if all is well, 1 if a kernel is wrong or a registration is missing (a line on stderr says
which), 2 if a setting cannot be used here.
"""

_LIBRARIES = ("ktcompile", "torch", "transformers", "triton", "safetensors", "numpy")
_MEMINFO = Path("/proc/meminfo")
# Bytes to stream for a measurement: more than the caches hold, and little of the memory.
_READ_BYTES, _QUICK_READ_BYTES = 1 << 30, 1 << 27


@dataclass(frozen=True, slots=True)
class Speed:
    """The ceilings of an ISA on the threads in use: bytes and floating-point operations per second."""

    read_bandwidth: float
    arithmetic: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that `ktc doctor` finds.

    isa_reason: why `machine.isa` was chosen. memory_available_bytes: None where the system does not tell.
    cuda: "usable", or why the device "cuda" cannot be used. versions: of libraries; None for one that is not
    installed. backend_registered: whether torch.compile finds the backend "kt". experts_registered: whether
    transformers has the experts implementation "kt".
    """

    machine: Machine
    isas_built: tuple[str, ...]
    isa_reason: str
    memory_available_bytes: int | None
    threads: int
    cuda: str
    versions: dict[str, str | None]
    backend_registered: bool
    experts_registered: bool
    speeds: dict[str, Speed]
    checks: tuple[KernelCheck, ...]

    @property
    def problems(self) -> list[str]:
        found = [c.problem for c in self.checks if not c.ok]
        if not self.backend_registered:
            found.append('torch.compile has no backend "kt": reinstall ktcompile, its entry point is missing')
        if not self.experts_registered:
            found.append('transformers has no experts implementation "kt": it needs transformers 5.0 or newer')
        return found


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="describe this machine and check every kernel on it",
        description="Describe this machine, measure its ceilings and check every kernel that runs on it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="shorter measurements and fewer activations")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis and return 1 if something is wrong with it."""
    diagnosis = diagnose(quick=args.quick)
    problems = diagnosis.problems
    if args.json:
        print(json.dumps({"ok": not problems, "problems": problems, **asdict(diagnosis)}, indent=2))
    else:
        _print(diagnosis)
    for problem in problems:
        print(f"ktc: {problem}", file=sys.stderr)
    return 1 if problems else 0


def diagnose(quick: bool) -> Diagnosis:
    """Return what there is to know. ValueError: a KTCOMPILE_* variable cannot be used on this machine."""
    from ktcompile import _native, env, get_num_threads
    from ktcompile.machine import machine
    from ktcompile.runtime import self_check
    from ktcompile.runtime.cuda_support import why_not

    facts, threads = machine(), get_num_threads()
    activations = self_check.QUICK_ACTIVATIONS if quick else self_check.ACTIVATIONS
    return Diagnosis(
        machine=facts,
        isas_built=tuple(_native.isas()),
        isa_reason="KTCOMPILE_ISA" if env.read().isa else "measured",
        memory_available_bytes=_memory_available(),
        threads=threads,
        cuda=why_not() or "usable",
        versions={"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
        backend_registered=_backend_registered(),
        experts_registered=_experts_registered(),
        speeds={isa: _speed(isa, quick) for isa in facts.isas},
        checks=tuple(self_check.check_kernels(activations=activations)),
    )


def _speed(isa: str, quick: bool) -> Speed:
    from ktcompile.ops.threads import native_threads

    context = native_threads().context()
    size = min(_QUICK_READ_BYTES if quick else _READ_BYTES, (_memory_available() or _QUICK_READ_BYTES) // 8)
    repeats = 2 if quick else 5
    return Speed(context.read_bandwidth(isa, size, repeats), context.arithmetic(isa, False, 0.01 * repeats))


def _memory_available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _version(library: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _backend_registered() -> bool:
    from importlib.metadata import entry_points

    return any(callable(e.load()) for e in entry_points(group="torch_dynamo_backends", name="kt"))


def _experts_registered() -> bool:
    from ktcompile.models.hf_experts import NAME

    try:
        import transformers.modeling_utils  # noqa: F401  (it has what is registered)
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return False
    return NAME in ALL_EXPERTS_FUNCTIONS.valid_keys()


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for table in (_machine_table(diagnosis), _speed_table(diagnosis), _check_table(diagnosis)):
        console.print(table)
    verdict = f"{len(diagnosis.problems)} problems" if diagnosis.problems else "all is well"
    console.print(f"{len(diagnosis.checks)} kernels checked: {verdict}")


def _machine_table(diagnosis: Diagnosis) -> Table:
    from rich import box
    from rich.table import Table

    machine = diagnosis.machine
    available = diagnosis.memory_available_bytes
    memory = f"{machine.memory_bytes / 2**30:.1f} GiB"
    if available is not None:
        memory += f", {available / 2**30:.1f} GiB available"
    rows = {
        "CPU": machine.cpu,
        "features": ", ".join(machine.features) or "none that kernels use",
        "ISAs of this build": ", ".join(diagnosis.isas_built),
        "ISAs found": ", ".join(machine.isas),
        "ISA in use": f"{machine.isa} ({diagnosis.isa_reason})",
        "cores": f"{machine.cores} ({machine.cpus} logical CPUs)",
        "threads": str(diagnosis.threads),
        "NUMA nodes": str(machine.numa_nodes),
        "memory": memory,
        "GPUs": ", ".join(machine.gpus) or "none",
        'device "cuda"': diagnosis.cuda,
        **{name: version or "not installed" for name, version in diagnosis.versions.items()},
        'torch.compile backend "kt"': "registered" if diagnosis.backend_registered else "missing",
        'experts implementation "kt"': "registered" if diagnosis.experts_registered else "missing",
    }
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _speed_table(diagnosis: Diagnosis) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("ISA", box=box.SIMPLE)
    table.add_column("read bandwidth", justify="right")
    table.add_column("peak arithmetic", justify="right")
    for isa, speed in diagnosis.speeds.items():
        table.add_row(isa, f"{speed.read_bandwidth / 1e9:.1f} GB/s", f"{speed.arithmetic / 1e9:.1f} GFLOP/s")
    return table


def _check_table(diagnosis: Diagnosis) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("ISA", "format", "kernels", box=box.SIMPLE)
    for isa, name in dict.fromkeys((c.isa, c.weight_format) for c in diagnosis.checks):
        table.add_row(isa, name, _summary([c for c in diagnosis.checks if (c.isa, c.weight_format) == (isa, name)]))
    return table


def _summary(checks: list[KernelCheck]) -> str:
    wrong = sum(not c.ok for c in checks)
    if wrong:
        return f"[bold red]{wrong} of {len(checks)} wrong"
    worst = max(c.error / c.budget for c in checks)
    return f"[green]{len(checks)} right[/], up to {worst:.0%} of budget"
