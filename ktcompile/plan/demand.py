"""What traffic is expected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.table import Floats


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Expected traffic for each decode step.

    touches [L, E]: the share of decode steps in which an expert has tokens. touch_rows: its tokens in such a step.
    prefill_rows [L, E]: its tokens in a prefill step. prefills: prefill steps for each decode step.
    """

    touches: Floats
    touch_rows: float
    prefill_rows: Floats
    prefills: float

    @classmethod
    def of_profile(cls, profile: RoutingProfile) -> Demand:
        """Return the traffic that a profile recorded; each phase stands in for the other if only one was seen."""
        decode, prefill = profile.steps(Phase.DECODE), profile.steps(Phase.PREFILL)
        tokens = profile.tokens(Phase.DECODE) + profile.tokens(Phase.PREFILL)
        if not tokens:
            nothing = np.zeros(profile.shape)
            return cls(nothing, 1.0, nothing, 0.0)
        rates = (profile.rows(Phase.DECODE) + profile.rows(Phase.PREFILL)) / tokens
        touched = profile.touched(Phase.DECODE)
        touches = touched / decode if decode else np.minimum(rates, 1.0)
        per_touch = float(profile.rows(Phase.DECODE).sum() / touched.sum()) if touched.any() else 1.0
        prefill_rows = profile.rows(Phase.PREFILL) / prefill if prefill else np.zeros(profile.shape)
        return cls(touches, per_touch, prefill_rows, prefill / decode if decode else 0.0)
