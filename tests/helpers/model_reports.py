"""Reports of whole models that nobody measured, and a model that nobody has."""

from __future__ import annotations

from ktcompile.bench.model.contenders import ModelContender
from ktcompile.bench.model.demand import Demand, Work
from ktcompile.bench.model.report import ModelReport, Start, Turn
from ktcompile.bench.roofline import Ceilings
from ktcompile.plan.architecture import Architecture, LayerCache, RoutedExperts

FLOAT = "float/scalar"
DECODE, PREFILL = Work("decode", 4), Work("prefill", 32)

# Two layers of 8 experts, two for each token, of 3 * 64 * 32 weights; a head of 64 * 100; 10,000 other weights.
MODEL = Architecture(
    name="small",
    model_type="small_moe",
    num_layers=2,
    hidden_size=64,
    vocab_size=100,
    dtype_bytes=2,
    parameters=2 * 8 * 6144 + 6400 + 6400 + 10_000,
    dense_bytes=2 * (6400 + 6400 + 10_000),
    dense_read_bytes=2 * (6400 + 10_000),
    dense_flops_per_token=2 * (6400 + 10_000),
    attention_flops=4 * 2 * 64,
    experts=(RoutedExperts(0, 8, 2, 64, 32), RoutedExperts(1, 8, 2, 64, 32)),
    cache=(LayerCache(256), LayerCache(256)),
    stored_format="bf16",
    stored_bytes=0,
)


def contender(name, **others):
    kind, _, variant = name.partition(":")
    values = {"python": "python", "arithmetic": FLOAT, "expert_bytes": 2.0, "dense_bytes": 2.0, **others}
    return ModelContender(name, kind, variant, **values)


OURS, PEER, THIRD = contender("kt"), contender("transformers"), contender("vllm")


def turn(who, work, round, seconds):
    return Turn(who.name, work, round, 3, seconds, 0.5 * seconds, 1e9, 2e9)


def report(interrupted=False, seconds=((OURS, (1.0, 2.0, 4.0)), (PEER, (3.0, 4.0, 4.0)))):
    """Return a report with these seconds of each round, at both works; a call takes 1e9 bytes and 1e9 operations."""
    turns = [turn(who, work, i, s) for work in (DECODE, PREFILL) for who, own in seconds for i, s in enumerate(own)]
    names = [who.name for who, _ in seconds]
    first = {str(DECODE): 2.0, str(PREFILL): 3.0}
    return ModelReport(
        machine={"cpu": "a CPU", "isa": "scalar", "threads": 1, "date": "2026-01-01T00:00:00+00:00"},
        method={"rounds": 3},
        model={"name": "small", "parameters": 121_104, "stored_format": "bf16"},
        interrupted=interrupted,
        contenders=tuple(who for who, _ in seconds),
        demands={name: {str(work): Demand(1e9, 1e9) for work in (DECODE, PREFILL)} for name in names},
        starts={name: Start(10.0, 10**9, {"python": "3.11"}, first, 2 * 10**9) for name in names},
        agreement={PEER.name: 0.75},
        skipped={"zentorch": "not installed in python"},
        best=Ceilings(2e9, {FLOAT: 2e9}),
        turns=tuple(turns),
    )
