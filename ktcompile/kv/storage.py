"""The memory of keys and values of all layers, and how much of it there should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ktcompile.kv.layout import LayerKV
from ktcompile.machine import machine
from ktcompile.ops.kv import KVFormat, PagedKV

# Of the memory that is free once the model is loaded. The rest is for activations, the files' cache and others.
SHARE = 3


def layer_kv(kv_format: KVFormat, kv_heads: int, key_size: int, value_size: int) -> LayerKV:
    """Return what a layer keeps of a position. Where keys and values differ in their scales the larger count."""
    groups = max(kv_format.groups(key_size), kv_format.groups(value_size))
    return LayerKV(kv_heads, key_size, value_size, kv_format.dtype.itemsize, 4 * groups)


def latent_kv(kv_format: KVFormat, key_size: int, value_size: int) -> LayerKV:
    """Return what a layer keeps of a position that keeps latents, of which `value_size` elements are the values."""
    groups = kv_format.groups(key_size)
    return LayerKV(1, key_size, 0, kv_format.dtype.itemsize, 4 * groups, value_size)


def allocate(kv_format: KVFormat, layers: Sequence[LayerKV], num_blocks: int, block_size: int) -> tuple[PagedKV, ...]:
    """Return storage for each layer. The system gives it memory as blocks are written to for the first time."""
    return tuple(
        PagedKV.empty_latents(kv_format, num_blocks, block_size, layer.key_dim, layer.latent_dim)
        if layer.latent_dim
        else PagedKV.empty(kv_format, num_blocks, block_size, layer.num_heads, layer.key_dim, layer.value_dim)
        for layer in layers
    )


def default_budget(free: int | None = None) -> int:
    """Return the bytes for keys and values where nobody says: a third of the free memory. free: bytes, None: asked."""
    return (free_memory() if free is None else free) // SHARE


def free_memory() -> int:
    """Return the bytes that programs could still have, by the system and by the group of processes that this is in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return machine().memory_bytes // 2
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
