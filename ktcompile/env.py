"""Every environment variable that ktcompile reads, each in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Environment:
    """What the KTCOMPILE_* variables say; None where one is not set.

    isa: KTCOMPILE_ISA, the instruction set of every kernel.
    features: KTCOMPILE_FEATURES, comma-separated; `-name` hides a CPU feature, `+name` adds one that the CPU
        executes but does not report (some hypervisors hide them).
    num_threads: KTCOMPILE_NUM_THREADS.
    dump_graphs: KTCOMPILE_DUMP_GRAPHS, a directory for the graphs before and after each pass.
    self_check: KTCOMPILE_SELF_CHECK, 0 or 1 (which it is without): whether experts are compared with plain torch when
        they are packed and when they are first called.
    packed_cache: KTCOMPILE_PACKED_CACHE, a directory for packed models, or "off".
    """

    isa: str | None
    features: tuple[str, ...]
    num_threads: int | None
    dump_graphs: Path | None
    self_check: bool
    packed_cache: str | None


def read() -> Environment:
    """Return the variables as they are now. ValueError names a variable that cannot be used."""
    threads = os.environ.get("KTCOMPILE_NUM_THREADS")
    if threads is not None and (not threads.isdecimal() or int(threads) < 1):
        raise ValueError(f"KTCOMPILE_NUM_THREADS is {threads!r}; it must be a whole number of 1 or more")
    features = tuple(f.strip() for f in os.environ.get("KTCOMPILE_FEATURES", "").split(",") if f.strip())
    for feature in features:
        if feature[0] not in "+-":
            raise ValueError(f"KTCOMPILE_FEATURES has {feature!r}; write +{feature} to add or -{feature} to hide it")
    dump = os.environ.get("KTCOMPILE_DUMP_GRAPHS")
    check = os.environ.get("KTCOMPILE_SELF_CHECK", "")
    if check not in ("", "0", "1"):
        raise ValueError(f"KTCOMPILE_SELF_CHECK is {check!r}; it must be 0 or 1")
    return Environment(
        isa=os.environ.get("KTCOMPILE_ISA") or None,
        features=features,
        num_threads=int(threads) if threads else None,
        dump_graphs=Path(dump) if dump else None,
        self_check=check != "0",
        packed_cache=os.environ.get("KTCOMPILE_PACKED_CACHE") or None,
    )
