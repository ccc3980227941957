"""Reports of kernels that nobody measured."""

from __future__ import annotations

from ktcompile.bench.contenders import Contender
from ktcompile.bench.report import KernelsReport, ShapeReport, Turn, call_bytes
from ktcompile.bench.roofline import Ceilings
from ktcompile.bench.shapes import MoeShape

SHAPE = MoeShape(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
FLOAT, INT8 = "float/scalar", "int8/scalar"


def contender(name, library="ktcompile", **others):
    values = {
        "variant": name,
        "weight_format": "bf16",
        "isa": "scalar" if library == "ktcompile" else None,
        "bytes_per_weight": 2,
        "error_limit": 0.012,
        "arithmetic": FLOAT,
        "threads": 1,
        "error": 0.002,
    }
    return Contender(name=name, library=library, **{**values, **others})


OURS, PEER = contender("ktcompile-bf16/scalar"), contender("transformers-eager", "transformers")


def turn(who=OURS, tokens=1, round=0, seconds=1.0, bandwidth=1e9, flops=1e9, distinct=2.0):
    return Turn(who.name, tokens, round, 5, seconds, 0.9 * seconds, distinct, bandwidth, flops)


def report(*names, contenders=(OURS, PEER), tokens=(1, 2, 4, 64), interrupted=False, fraction=0.5):
    """Return a report in which every contender reaches `fraction` of the roofline at every token count."""
    best = Ceilings(1e9, {FLOAT: 2e9, INT8: 4e9})
    shapes = []
    for name in names or ("tiny",):
        turns = []
        for who in contenders:
            for t in tokens:
                distinct, peak = min(SHAPE.num_experts, 2 * t), best.flops[who.arithmetic]
                bound = max(call_bytes(SHAPE, who, t, distinct) / best.bandwidth, SHAPE.flops(t) / peak)
                turns += [turn(who, t, r, bound / fraction, best.bandwidth, peak, distinct) for r in range(2)]
        notes, skipped = ("a note",), {"kt-kernel-int4": "not installed"}
        shapes.append(ShapeReport(name, SHAPE, contenders, notes, skipped, best, tuple(turns)))
    machine = {"cpu": "a CPU", "isa": "scalar", "threads": 1, "date": "2026-01-01T00:00:00+00:00"}
    return KernelsReport(machine, {"rounds": 2}, interrupted, tuple(shapes))
