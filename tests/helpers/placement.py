"""Small models, profiles and traces for tests of placement."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ktcompile.plan.facts import ModelFacts, MoeLayerFacts
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.trace import Trace

SIZE = 3 * 2048 * 768


def model(*experts: int, sizes: tuple[int, ...] | None = None, top_k: int = 2) -> ModelFacts:
    """Return a model with so many experts in each layer, and experts of these bytes."""
    sizes = sizes or (SIZE,) * len(experts)
    layers = (MoeLayerFacts(e, min(top_k, e), 2048, 768, s) for e, s in zip(experts, sizes, strict=True))
    return ModelFacts(tuple(layers), dense_bytes=10**8, dense_flops_per_token=2 * 10**8)


def random_profile(facts: ModelFacts, seed: int, decode_steps: int = 500, prefills: int = 3) -> RoutingProfile:
    """Return a profile with skewed counts of both phases."""
    rng = np.random.default_rng(seed)
    most = max(layer.num_experts for layer in facts.layers)
    profile = RoutingProfile(len(facts.layers), most)
    share = np.zeros(profile.shape)
    for row, layer in zip(share, facts.layers, strict=True):
        row[: layer.num_experts] = rng.dirichlet(np.full(layer.num_experts, 0.5)) * layer.top_k
    share = np.minimum(share, 1.0)
    for phase, steps, tokens in ((Phase.DECODE, decode_steps, 1), (Phase.PREFILL, prefills, 800)):
        if steps:
            rows = rng.binomial(steps * tokens, share)
            profile.record_counts(rows, np.minimum(rows, steps), steps * tokens, steps, phase)
    return profile


def random_trace(layers: int, experts: int, top_k: int, kinds: list[int], seed: int) -> Trace:
    """Return a trace with a step of so many tokens for each kind; more than 8 tokens are a prefill."""
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.full(experts, 0.7), layers) + 1e-6
    rows = np.zeros((len(kinds), layers, experts), dtype=np.int64)
    for step, tokens in enumerate(kinds):
        race = rng.standard_exponential((tokens, layers, experts)) / weight
        ids = np.argsort(race, axis=2)[:, :, :top_k]
        for layer in range(layers):
            rows[step, layer] = np.bincount(ids[:, layer].ravel(), minlength=experts)
    return Trace.of_counts(rows, kinds, [tokens > 8 for tokens in kinds])


models = st.builds(
    lambda experts, scales: model(*experts, sizes=tuple(SIZE * s for s in scales[: len(experts)])),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
)


def naive_cost(hardware, layer: MoeLayerFacts, rows, resident) -> tuple[float, float, float, float, bool]:
    """Return cpu, device, copy, total and streamed of one layer's call, expert by expert."""
    used = [e for e in range(len(rows)) if rows[e]]
    cold = [e for e in used if not resident[e]]
    hot = [e for e in used if resident[e]]

    def busy(processor, experts) -> float:
        times = [processor.seconds(layer.expert_bytes, int(rows[e]) * layer.flops_per_row) for e in experts]
        return sum(times) + processor.overhead if times else 0.0

    cpu, device = busy(hardware.cpu, cold), busy(hardware.device, hot)
    if cold:
        longest = max(busy(hardware.device, [e]) for e in used) - hardware.device.overhead
        everything, copy = busy(hardware.device, used), hardware.link.seconds(len(cold) * layer.expert_bytes)
        streaming = max(everything, copy + longest)
        if streaming < max(cpu, device):
            return 0.0, everything, copy, streaming, True
    return cpu, device, 0.0, max(cpu, device), False
