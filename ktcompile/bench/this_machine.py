"""The machine that this runs on, as the cost model takes it: its ceilings are measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ktcompile.bench.roofline import Probe, arithmetic_of
from ktcompile.machine import machine
from ktcompile.plan.hardware import Hardware, Link, Processor

# Not measured: of a layer on an idle machine.
_CPU_OVERHEAD, _DEVICE_OVERHEAD, _LINK_LATENCY = 20e-6, 30e-6, 10e-6
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_COPY_BYTES, _LINK_BYTES, _MATRIX, _REPEATS = 1 << 30, 1 << 28, 8192, 5


def this_machine(threads: int) -> Hardware:
    """Return this machine with measured bandwidths and peaks. Of several GPUs it has the first.

    threads: native ones. Memory of the device is what is free of it now; RAM is all of it, or the container's limit.
    """
    facts = machine()
    arithmetic = arithmetic_of("bf16", facts.isa)
    ceilings = Probe(threads, [arithmetic]).measure()
    name = f"{facts.cpu}, {threads} threads, {facts.isa}"
    cpu = Processor(name, memory_bytes(), ceilings.bandwidth, ceilings.flops[arithmetic], _CPU_OVERHEAD)
    device, link = _device()
    return Hardware("this", cpu, device, link)


def memory_bytes() -> int:
    """Return the bytes of RAM that this process may use: those of the machine, or of the container."""
    try:
        limit = int(_LIMIT.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return machine().memory_bytes
    return min(limit, machine().memory_bytes)


def _device() -> tuple[Processor | None, Link | None]:
    import torch

    if not torch.cuda.is_available():
        return None, None
    place = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(place)
    size = min(_COPY_BYTES, free // 8)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=place) for _ in range(2))
    bandwidth = 2 * size / _seconds(lambda: target.copy_(source))
    a = torch.zeros(_MATRIX, _MATRIX, dtype=torch.bfloat16, device=place)
    flops = 2 * _MATRIX**3 / _seconds(lambda: a @ a)
    host = torch.zeros(min(_LINK_BYTES, size), dtype=torch.uint8, pin_memory=True)
    link = host.numel() / _seconds(lambda: target[: host.numel()].copy_(host, non_blocking=True))
    name = torch.cuda.get_device_name(place)
    return Processor(name, free, bandwidth, flops, _DEVICE_OVERHEAD), Link(link, _LINK_LATENCY)


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of some runs on the device, after one that does not count."""
    import torch

    times = []
    for _ in range(_REPEATS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
