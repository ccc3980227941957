"""Configuration records: frozen, and valid once they exist."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcompile import env
from ktcompile.machine import check_isa, machine
from ktcompile.quant import check_format

if TYPE_CHECKING:
    from typing_extensions import Self

WEIGHTS = ("copy", "take")
INNER = ("auto", "program", "inductor", "eager")
DEVICES = ("none", "stand-in", "cuda")
PLACEMENTS = ("adaptive", "uniform", "front", "random", "frequency", "counts")
NEED_PROFILE = ("frequency", "counts")
_PATHS = ("dump_graphs", "routing_profile", "kv_disk_path")

# Names and values: a record that hashes holds no dictionary.
Replan = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Which experts a device has, and how they move.

    device: "none"; "cuda", the current GPU; or "stand-in", which imitates one with memory of its own, to try and test.
    device_expert_fraction: of each layer's experts, how many the device holds. device_memory: its bytes; None: as
    many as that takes, but no more than a GPU has free. keep_cpu_copy: experts on the device stay with the CPU too.
    placement: which experts those are: "adaptive", by what routers choose while the model runs, or "uniform", "front",
    "random", and, by a recorded profile, "frequency" and "counts". routing_profile: its file.
    stream_from: calls of so many tokens copy the CPU's experts through the device; None: from where that is faster;
    0: none does.
    replan: when "adaptive" plans anew and what a move must earn: fields of `ktcompile.plan.replan.ReplanConfig`.
    """

    device: str = "none"
    device_expert_fraction: float = 0.5
    device_memory: int | None = None
    keep_cpu_copy: bool = False
    placement: str = "adaptive"
    routing_profile: Path | None = None
    stream_from: int | None = None
    replan: Replan = ()

    def __post_init__(self) -> None:
        _one_of("device", self.device, DEVICES)
        _one_of("placement", self.placement, PLACEMENTS)
        if self.placement in NEED_PROFILE and self.routing_profile is None:
            raise ValueError(f"placement is {self.placement!r}, which needs a routing_profile")
        if not 0 <= self.device_expert_fraction <= 1:
            raise ValueError(f"device_expert_fraction is {self.device_expert_fraction}; it must be from 0 to 1")
        if self.device_memory is not None and self.device_memory < 0:
            raise ValueError(f"device_memory is {self.device_memory}; it must be 0 bytes or more")
        if self.stream_from is not None and self.stream_from < 0:
            raise ValueError(f"stream_from is {self.stream_from}; it must be 0 tokens or more")

    @classmethod
    def of_keywords(cls, options: Mapping[str, Any], owner: str) -> Self:
        """Return the record of options by name. owner: whose they are, for messages. ValueError: one is unknown, or
        its value cannot be used."""
        given = dict(options)
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"option {name!r} of {owner} is unknown{hint} Known: {', '.join(known)}")
        for name in _PATHS:
            if isinstance(given.get(name), str):
                given[name] = Path(given[name])
        if isinstance(given.get("replan"), Mapping):
            given["replan"] = tuple(given["replan"].items())
        return cls(**given)

    def device_options(self) -> dict[str, Any]:
        """Return the options of the device by name."""
        return {f.name: getattr(self, f.name) for f in fields(DeviceOptions)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions(DeviceOptions):
    """Options of `torch.compile(model, backend="kt", options={...})`: those of the device, and these.

    weight_format: of experts. "auto" keeps the source's; else a name of `ktcompile.quant.FORMATS`.
    dense_format: likewise of linear layers with 512 outputs and more. Smaller ones, routers among them, keep theirs.
    head_format: likewise of the one of these that a model ends in, which makes the logits; None: as dense_format.
    weights: "copy" leaves the model as it is; "take" frees the source storage of what is packed,
    after which only the compiled model can be called.
    inner: who runs the graph. "program": kernels, and what stands between them, without Python, what is left operation
    by operation; "inductor": what is left is compiled by Inductor; "eager": all operation by operation; "auto":
    "program" on the CPU alone, "inductor" with a device or for gradients.
    isa: instruction set of the kernels; None: the best of this machine.
    disable_passes: names of passes to leave out.
    dump_graphs: directory for the graph before and after each pass; None: none are written.
    """

    weight_format: str = "auto"
    dense_format: str = "auto"
    head_format: str | None = None
    weights: str = "copy"
    inner: str = "auto"
    isa: str | None = None
    disable_passes: tuple[str, ...] = ()
    dump_graphs: Path | None = None

    def __post_init__(self) -> None:
        DeviceOptions.__post_init__(self)
        check_format(self.weight_format)
        check_format(self.dense_format, "dense_format")
        if self.head_format is not None:
            check_format(self.head_format, "head_format")
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("inner", self.inner, INNER)
        if self.isa is not None:
            check_isa(self.isa, machine().isas)

    @property
    def format_of_head(self) -> str:
        return self.dense_format if self.head_format is None else self.head_format

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any] | None) -> CompileOptions:
        """Return the options of a `torch.compile` call; what they leave out comes from the environment."""
        given = {"dump_graphs": env.read().dump_graphs, **(options or {})}
        disabled = given.get("disable_passes", ())
        if isinstance(disabled, str):
            raise ValueError(f"disable_passes is {disabled!r}; it must be a list of names")
        given["disable_passes"] = tuple(disabled)
        return cls.of_keywords(given, "backend 'kt'")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
