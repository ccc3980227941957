"""Configuration records: frozen, and valid once they exist."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ktcompile import env
from ktcompile.machine import check_isa, machine
from ktcompile.quant import check_format

WEIGHTS = ("copy", "take")
INNER = ("inductor", "eager")
DEVICES = ("none", "stand-in", "cuda")
PLACEMENTS = ("adaptive", "uniform", "front", "random", "frequency", "counts")


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """Options of `torch.compile(model, backend="kt", options={...})`.

    weight_format: "auto" keeps the source's; else a name of `ktcompile.quant.FORMATS`.
    weights: "copy" leaves the model as it is; "take" frees the experts' source storage after packing.
    inner: who runs the rest of the graph, "inductor" or "eager".
    isa: instruction set of the kernels; None: the best of this machine.
    device: "none"; "cuda", the current GPU; or "stand-in", which imitates one with memory of its own, to try and test.
    device_expert_fraction: of each layer's experts, how many the device holds. device_memory: its bytes; None: as
    many as that takes, but no more than a GPU has free. keep_cpu_copy: experts on the device stay with the CPU too.
    placement: which experts those are: "adaptive", by what routers choose while the model runs, or "uniform", "front",
    "random", and, by a recorded profile, "frequency" and "counts". routing_profile: its file.
    stream_from: calls of so many tokens copy the CPU's experts through the device; None: from where that is faster;
    0: none does.
    disable_passes: names of passes to leave out.
    dump_graphs: directory for the graph before and after each pass; None: none are written.
    """

    weight_format: str = "auto"
    weights: str = "copy"
    inner: str = "inductor"
    isa: str | None = None
    device: str = "none"
    device_expert_fraction: float = 0.5
    device_memory: int | None = None
    keep_cpu_copy: bool = False
    placement: str = "adaptive"
    routing_profile: Path | None = None
    stream_from: int | None = None
    disable_passes: tuple[str, ...] = ()
    dump_graphs: Path | None = None

    def __post_init__(self) -> None:
        check_format(self.weight_format)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("inner", self.inner, INNER)
        if self.isa is not None:
            check_isa(self.isa, machine().isas)
        _one_of("device", self.device, DEVICES)
        _one_of("placement", self.placement, PLACEMENTS)
        if self.placement in ("frequency", "counts") and self.routing_profile is None:
            raise ValueError(f"placement is {self.placement!r}, which needs a routing_profile")
        if not 0 <= self.device_expert_fraction <= 1:
            raise ValueError(f"device_expert_fraction is {self.device_expert_fraction}; it must be from 0 to 1")
        if self.device_memory is not None and self.device_memory < 0:
            raise ValueError(f"device_memory is {self.device_memory}; it must be 0 bytes or more")

        if self.stream_from is not None and self.stream_from < 0:
            raise ValueError(f"stream_from is {self.stream_from}; it must be 0 tokens or more")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any] | None) -> CompileOptions:
        """Return the options of a `torch.compile` call; what they leave out comes from the environment."""
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"option {name!r} of backend 'kt' is unknown{hint} Known: {', '.join(known)}")
        given.setdefault("dump_graphs", env.read().dump_graphs)
        for name in ("dump_graphs", "routing_profile"):
            if isinstance(given.get(name), str):
                given[name] = Path(given[name])
        disabled = given.get("disable_passes", ())
        if isinstance(disabled, str):
            raise ValueError(f"disable_passes is {disabled!r}; it must be a list of names")
        given["disable_passes"] = tuple(disabled)
        return cls(**given)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
