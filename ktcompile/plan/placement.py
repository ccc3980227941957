"""Strategies that choose which experts are on the device before the first token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ktcompile.plan.demand import Demand
from ktcompile.plan.facts import ModelFacts
from ktcompile.plan.hardware import Hardware
from ktcompile.plan.outlook import Outlook
from ktcompile.plan.plan import Plan
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.table import ExpertTable, Mask, exists


def budget_of(facts: ModelFacts, fraction: float) -> int:
    """Return the bytes of a fraction of all experts. ValueError: it is not from 0 to 1."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of experts on the device is {fraction}; it must be from 0 to 1")
    return round(facts.expert_bytes * fraction)


def place(
    strategy: str,
    facts: ModelFacts,
    hardware: Hardware,
    budget_bytes: int,
    profile: RoutingProfile | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan of a strategy, one of `STRATEGIES`.

    budget_bytes: what experts may take on the device; it may be 0, less than one expert, or more than all.
    profile: needed by `frequency` and `counts`; `adaptive` begins with it, or like `uniform` without one.
    ValueError: the strategy is unknown or lacks its profile, or the profile is another model's.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown; there are {', '.join(STRATEGIES)}")
    if budget_bytes < 0:
        raise ValueError(f"the budget is {budget_bytes} bytes; it must not be negative")
    if hardware.device is None or not facts.layers:
        none = np.zeros_like(exists(facts))
        return Plan.of_mask(facts, none, budget_bytes, strategy, ("there is no device, or there are no experts",))
    table = ExpertTable.of(facts, hardware)
    if profile is not None and profile.shape != table.shape:
        raise ValueError(f"the profile is of {profile.shape} layers and experts; the model has {table.shape}")
    mask, reason = STRATEGIES[strategy](table, budget_bytes, profile, seed)
    return Plan.of_mask(facts, mask, budget_bytes, strategy, (reason,))


def take(order: np.ndarray, table: ExpertTable, budget_bytes: float) -> Mask:
    """Return the longest beginning of an order of flat (layer, expert) indices that fits the budget, as a mask.

    A larger budget's mask contains a smaller one's, since the first expert that does not fit ends it.
    """
    sizes = np.cumsum(np.repeat(table.bytes, table.shape[1])[order])
    mask = np.zeros(table.exists.size, dtype=np.bool_)
    mask[order[: np.searchsorted(sizes, budget_bytes, side="right")]] = True
    return mask.reshape(table.shape)


def by_density(seconds_LE: np.ndarray, table: ExpertTable) -> np.ndarray:
    """Return the flat indices of all experts, the most seconds saved for each byte first.

    Among equals the lower id comes first, then the lower layer: without counts this is `uniform`.
    """
    layer, expert = np.nonzero(table.exists)
    density = (seconds_LE / table.bytes[:, None])[layer, expert]
    order: np.ndarray = (layer * table.shape[1] + expert)[np.lexsort((layer, expert, -density))]
    return order


def _uniform(table: ExpertTable, budget: int, profile: RoutingProfile | None, seed: int) -> tuple[Mask, str]:
    return take(by_density(np.zeros(table.shape), table), table, budget), "the first ids of every layer"


def _front(table: ExpertTable, budget: int, profile: RoutingProfile | None, seed: int) -> tuple[Mask, str]:
    return take(np.flatnonzero(table.exists), table, budget), "whole layers, the first ones first"


def _random(table: ExpertTable, budget: int, profile: RoutingProfile | None, seed: int) -> tuple[Mask, str]:
    order = np.random.default_rng(seed).permutation(np.flatnonzero(table.exists))
    return take(order, table, budget), f"random experts, seed {seed}"


def _frequency(table: ExpertTable, budget: int, profile: RoutingProfile | None, seed: int) -> tuple[Mask, str]:
    if profile is None:
        raise ValueError("strategy 'frequency' needs a routing profile")
    demand = Demand.of_profile(profile)
    mask = most_saved(table, demand, budget)
    left = int(budget >= float((table.exists * table.bytes[:, None]).sum())) * int((table.exists & ~mask).sum())
    unused = f"; {left} are left to the CPU, which is idle otherwise" if left else ""
    return mask, f"the experts that save most seconds for each byte by the profile{unused}"


def most_saved(table: ExpertTable, demand: Demand, budget: float, steady_within: float = 0.0) -> Mask:
    """Return the experts that save most within a budget. A larger budget never makes the expected step slower.

    steady_within: budget for which experts that most steps use may be left to the CPU (`Outlook.steadying`).
    """
    seconds = Outlook(table, demand).marginal_savings(steady_within)
    order = by_density(seconds, table)
    if demand.touches.any() or demand.prefill_rows.any():
        order = order[seconds.reshape(-1)[order] > 0]
    return take(order, table, budget)


def _counts(table: ExpertTable, budget: int, profile: RoutingProfile | None, seed: int) -> tuple[Mask, str]:
    if profile is None:
        raise ValueError("strategy 'counts' needs a routing profile")
    rows = profile.rows(Phase.DECODE) + profile.rows(Phase.PREFILL)
    return take(by_density(rows * table.bytes[:, None], table), table, budget), "the experts with most tokens"


def _adaptive(table: ExpertTable, budget: int, profile: RoutingProfile | None, seed: int) -> tuple[Mask, str]:
    if profile is None:
        mask, reason = _uniform(table, budget, profile, seed)
    else:
        mask = most_saved(table, Demand.of_profile(profile), budget, steady_within=budget)
        reason = "the experts that save most seconds for each byte by the profile"
    return mask, f"{reason}, to be re-planned"


# `counts` is the static strategy of KTransformers: most tokens first, whatever an expert saves.
STRATEGIES: dict[str, Callable[[ExpertTable, int, RoutingProfile | None, int], tuple[Mask, str]]] = {
    "uniform": _uniform,
    "front": _front,
    "random": _random,
    "frequency": _frequency,
    "counts": _counts,
    "adaptive": _adaptive,
}
