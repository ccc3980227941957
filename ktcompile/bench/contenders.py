"""Who takes part in a benchmark of kernels, what each reads, and whether all of them fit into memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import torch

from ktcompile.bench import roofline
from ktcompile.bench.shapes import MoeShape
from ktcompile.quant import resolve_format

OURS, KT_KERNEL = "ktcompile", "kt-kernel"
DEFAULT_FORMATS = ("bf16", "int8", "int4")

# How far above its format's error budget a result may be, and the rounding of the result itself to bf16.
_ERROR_TOLERANCE, _OUTPUT_ROUNDING = 2, 2**-9
# Copies of the weights, so that the calls of a turn together read several times what the caches hold.
_CACHES_READ, _MOST_LAYERS = 4, 16
# What a process of torch takes without any weights.
_PROCESS_BYTES = 300 << 20


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a layer.

    library: whose code runs, a process each. variant: which of the library's. isa: of ktcompile alone.
    arithmetic: the ceiling that bounds it. layers: copies of the weights that take turns. threads: of its own.
    error: relative, against fp64 on the unquantised weights; None until it was checked.
    """

    name: str
    library: str
    variant: str
    weight_format: str
    isa: str | None
    bytes_per_weight: float
    error_limit: float
    arithmetic: str
    threads: int
    layers: int = 1
    error: float | None = None

    @property
    def ours(self) -> bool:
        return self.library == OURS

    def setup(self, max_tokens: int) -> dict[str, Any]:
        """Return what the process that runs it is told."""
        return {**asdict(self), "max_tokens": max_tokens}


@dataclass(frozen=True, slots=True)
class Peer:
    """bytes_per_weight: packed, without scales. error_budget: as of a `WeightFormat`. package: to be imported.
    arithmetic: what it multiplies, float or int8."""

    library: str
    package: str
    variant: str
    weight_format: str
    bytes_per_weight: float
    error_budget: float
    arithmetic: str = "float"


PEERS = {
    "transformers-eager": Peer("transformers", "transformers", "eager", "bf16", 2, 0.005),
    "transformers-grouped_mm": Peer("transformers", "transformers", "grouped_mm", "bf16", 2, 0.005),
    "kt-kernel-bf16": Peer(KT_KERNEL, "kt_kernel", "AMXBF16_MOE", "bf16", 2, 0.005),
    "kt-kernel-int8": Peer(KT_KERNEL, "kt_kernel", "AMXInt8_MOE", "int8", 1, 0.03, "int8"),
    "kt-kernel-int4": Peer(KT_KERNEL, "kt_kernel", "AMXInt4_MOE", "int4", 0.5, 0.3, "int8"),
    "kt-kernel-avx2-bf16": Peer(KT_KERNEL, "kt_kernel", "AVX2BF16_MOE", "bf16", 2, 0.005),
}


def our_contenders(formats: Iterable[str], isas: Iterable[str], threads: int) -> tuple[Contender, ...]:
    """Return ktcompile in each format on each ISA. ValueError: a format is unknown."""
    found = []
    for weights in dict.fromkeys(resolve_format(name, torch.bfloat16) for name in formats):
        for isa in dict.fromkeys(isas):
            found.append(
                Contender(
                    name=f"{OURS}-{weights.name}/{isa}",
                    library=OURS,
                    variant=weights.name,
                    weight_format=weights.name,
                    isa=isa,
                    bytes_per_weight=weights.bytes_per_weight,
                    error_limit=_error_limit(weights.error_budget),
                    arithmetic=roofline.arithmetic_of(weights.name, isa),
                    threads=threads,
                )
            )
    return tuple(found)


def peer_contenders(names: Iterable[str], threads: int, kt_threads: Sequence[int]) -> tuple[Contender, ...]:
    """Return the peers called `names`, bounded by the fastest arithmetic of their kind.

    kt_threads: thread counts of kt-kernel, a contender each; the name says which where there are several.
    """
    fastest = {kind: roofline.fastest_arithmetic(kind, threads) for kind in ("float", "int8")}
    counts = tuple(dict.fromkeys(kt_threads))
    return tuple(
        Contender(
            name=name if peer.library != KT_KERNEL or len(counts) == 1 else f"{name}/{count}",
            library=peer.library,
            variant=peer.variant,
            weight_format=peer.weight_format,
            isa=None,
            bytes_per_weight=peer.bytes_per_weight,
            error_limit=_error_limit(peer.error_budget),
            arithmetic=fastest[peer.arithmetic],
            threads=count,
        )
        for name, peer in ((name, PEERS[name]) for name in dict.fromkeys(names))
        for count in (counts if peer.library == KT_KERNEL else (threads,))
    )


def choose_peers(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the peers that `names` asks for ("all", "none" or names), and why others are left out.

    ValueError: one that is asked for by name is unknown or not installed.
    """
    if list(names) == ["none"]:
        return (), {}
    missing = {name: "not installed" for name, peer in PEERS.items() if not importlib.util.find_spec(peer.package)}
    if list(names) == ["all"]:
        return tuple(name for name in PEERS if name not in missing), missing
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer {name!r} is unknown; there are all, none, {', '.join(PEERS)}")
        if name in missing:
            raise ValueError(f"peer {name!r} is not installed")
    return tuple(names), {}


def processes(contenders: Iterable[Contender]) -> list[tuple[Contender, ...]]:
    """Return the contenders that share a process.

    Those of ktcompile and of transformers share weights. kt-kernel has a process for each class and thread count: its
    threads spin while they wait, and a class may end the process that it runs in.
    """

    def key(c: Contender) -> tuple[str, str, int]:
        return c.library, c.variant if c.library == KT_KERNEL else "", c.threads

    return [tuple(group) for _, group in groupby(sorted(contenders, key=key), key)]


def with_layers(contenders: Iterable[Contender], shape: MoeShape, cache_bytes: int) -> tuple[Contender, ...]:
    """Return the contenders with as many copies of the weights as keep them out of the caches.

    One layer is enough if it is several times larger than the caches: calls touch the experts that were touched
    longest ago (`worker.Routing`), so that between two reads of an expert (almost) the whole layer is read.
    """
    return tuple(
        replace(c, layers=min(_MOST_LAYERS, -(-_CACHES_READ * cache_bytes // _layer_bytes(c, shape))))
        for c in contenders
    )


def fits_in_cache(contender: Contender, shape: MoeShape, cache_bytes: int) -> bool:
    """Return whether a good part of what its calls read may come from the caches."""
    return contender.layers * _layer_bytes(contender, shape) < 2 * cache_bytes


def needed_bytes(contenders: Iterable[Contender], shape: MoeShape, max_tokens: int) -> int:
    """Return the memory that all of them need at once; peers that copy contiguous weights are set up first."""
    # Contenders of ktcompile in one format share their weights, as do those of transformers.
    packed = {(c.library, "" if c.library == "transformers" else c.variant, c.threads): c for c in contenders}
    weights = sum(c.layers * _layer_bytes(c, shape) for c in packed.values())
    copying = sum(c.layers * _layer_bytes(c, shape) for c in packed.values() if c.library == KT_KERNEL)
    source = 2 * shape.num_experts * shape.expert_weights if copying else 0
    rows = max_tokens * shape.top_k * (2 * shape.hidden_size + 3 * shape.intermediate_size) * 2
    groups = len(processes(contenders))
    return max(weights + groups * rows, copying + source) + groups * _PROCESS_BYTES + roofline.probe_bytes()


def fit_experts(contenders: Sequence[Contender], shape: MoeShape, max_tokens: int, free: int) -> MoeShape:
    """Return the shape with as many experts as are useful and fit into `free` bytes.

    Eight times top_k are enough for consecutive calls of one token to touch experts of their own. ValueError: not
    even top_k experts fit.
    """
    cache, most = roofline.cache_bytes(), min(shape.num_experts, 8 * shape.top_k)
    for experts in (*range(most, shape.top_k, -shape.top_k), shape.top_k):
        smaller = replace(shape, num_experts=experts)
        needed = needed_bytes(with_layers(contenders, smaller, cache), smaller, max_tokens)
        if needed <= free:
            return smaller
    raise ValueError(_too_large(contenders, smaller, needed, free, "fewer --formats or --peers"))


def check_fit(contenders: Sequence[Contender], shape: MoeShape, max_tokens: int, free: int) -> None:
    """Raise ValueError if the contenders do not fit into `free` bytes."""
    needed = needed_bytes(with_layers(contenders, shape, roofline.cache_bytes()), shape, max_tokens)
    if needed > free:
        raise ValueError(_too_large(contenders, shape, needed, free, "fewer --experts, --formats or --peers"))


def _too_large(contenders: Sequence[Contender], shape: MoeShape, needed: int, free: int, advice: str) -> str:
    return (
        f"{len(contenders)} contenders with {shape.num_experts} experts of {shape.hidden_size} x "
        f"{shape.intermediate_size} need about {needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} may be used; "
        f"use {advice}"
    )


def _error_limit(budget: float) -> float:
    return _ERROR_TOLERANCE * budget + _OUTPUT_ROUNDING


def _layer_bytes(contender: Contender, shape: MoeShape) -> int:
    return round(shape.bytes(shape.num_experts, contender.bytes_per_weight))
