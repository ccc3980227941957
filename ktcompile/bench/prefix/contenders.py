"""Which engines take part, and what each is told of its memory for keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktcompile.bench.model.contenders import is_installed

OFF, TIERS = "off", "tiers"


@dataclass(frozen=True, slots=True)
class Kind:
    """An engine. driver: a module of `bench.model.drivers`. package: to be imported. variants: beside the plain one."""

    driver: str
    package: str
    what: str
    variants: tuple[str, ...]


KINDS = {
    "kt": Kind("kt_engine_driver", "ktcompile", "ktcompile's engine, its cache on the device alone", (TIERS, OFF)),
    "vllm": Kind("vllm_driver", "vllm", "its engine on the CPU, with its prefix cache", (OFF,)),
}
DEFAULT = ("kt", "kt:tiers", "kt:off")


@dataclass(frozen=True, slots=True)
class EngineContender:
    """An engine with or without a prefix cache. name: kind:variant, or the kind. python: the program that has it."""

    name: str
    kind: str
    variant: str
    python: str

    @property
    def ours(self) -> bool:
        return self.kind == "kt"


@dataclass(frozen=True, slots=True)
class Capacity:
    """Room for keys and values. Every engine has `memory` tokens of it in memory, and kt:tiers its disk beside.

    host: of them, those of the tier behind the device. block: tokens of a block. token_bytes: of all layers.
    """

    memory: int
    host: int
    disk: int
    block: int
    token_bytes: int

    def __post_init__(self) -> None:
        if min(self.memory, self.block, self.token_bytes, self.disk) < 1 or not 0 <= self.host < self.memory:
            raise ValueError(f"{self.memory} tokens, {self.host} in the host and {self.disk} on disk, cannot be")

    @property
    def device(self) -> int:
        """Tokens on the device of an engine that has tiers."""
        return self.memory - self.host

    def options(self, contender: EngineContender, folder: str) -> dict[str, Any]:
        """Return what a contender's engine is told, by its own names. folder: for what it writes to disk."""
        size = self.token_bytes
        caches = contender.variant != OFF
        if contender.kind == "vllm":
            return {
                "enable_prefix_caching": caches,
                "block_size": self.block,
                # One block of its own holds nothing.
                "kv_cache_memory_bytes": (self.memory + self.block) * size,
            }
        options: dict[str, Any] = {
            "enable_prefix_caching": caches,
            "block_size": self.block,
            "kv_device_memory": self.memory * size,
        }
        if contender.variant == TIERS:
            options |= {
                "kv_device_memory": self.device * size,
                "kv_host_memory": self.host * size,
                "kv_disk_path": folder,
                "kv_disk_size": self.disk * size,
            }
        return options


def choose(names: Sequence[str], pythons: Mapping[str, str], ours: str) -> tuple[EngineContender, ...]:
    """Return the contenders of some names. pythons: by kind, the program that has a peer. ours: this one.

    ValueError: a name is unknown, or what it names is not installed.
    """
    for kind in pythons:
        if kind not in KINDS:
            raise ValueError(f"--peer-python names {kind!r}; there are {', '.join(KINDS)}")
    known = [f"{kind}:{variant}" if variant else kind for kind, k in KINDS.items() for variant in ("", *k.variants)]
    found = []
    for name in dict.fromkeys(names):
        if name not in known:
            raise ValueError(f"engine {name!r} is unknown; there are {', '.join(known)}")
        kind, _, variant = name.partition(":")
        python = pythons.get(kind, ours)
        if not is_installed(python, KINDS[kind].package):
            raise ValueError(f"{kind} is not installed in {python}; --peer-python {kind}=PYTHON names another")
        found.append(EngineContender(name, kind, variant, python))
    return tuple(found)
