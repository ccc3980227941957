"""Which experts the next tokens will go to, from counters of several memories."""

from __future__ import annotations

import numpy as np

from ktcompile.plan.demand import Demand
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.table import Floats

# Tokens after which a memory has lost half: a session's worth, a few requests', and the present requests'. The last one
# also forgets its share of a request with each prompt that takes the request's place.
_HALF_LIVES = (32768.0, 4096.0, 2048.0)
# How many tokens a longer memory's estimate counts for beside what a shorter one has counted.
_PRIORS = (256.0, 64.0, 1024.0)
# Tokens after which half is forgotten of how well an estimate did.
_SCORE_HALF_LIFE = 2048.0
# Share of a uniform estimate in each, so that an expert that was never seen is not impossible.
_FLOOR = 0.02


class Forecast:
    """Estimates of each expert's rate, the best of which is chosen by how well each foretold what came.

    Each memory's counts are added to the estimate of the longer memory before it, as a Bayesian would with that as the
    prior; the profile is the longest. Under unchanging traffic long memories foretell best, after a change of subject
    the short ones do, and none needs to be configured: by the likelihood of the decoded tokens, the best estimate is
    known within a few dozen of them.
    """

    def __init__(self, shape: tuple[int, int], top_k: Floats, profile: RoutingProfile | None = None) -> None:
        if profile is not None and profile.shape != shape:
            raise ValueError(f"the profile is of {profile.shape} layers and experts; the model has {shape}")
        self._top_k = top_k[:, None]
        self._memories = [RoutingProfile(*shape, half_life) for half_life in _HALF_LIVES]
        self._uniform = np.broadcast_to(self._top_k / shape[1], shape)
        self._prior = self._uniform if profile is None else self._of_profile(profile)
        self._estimates = self._all_estimates()
        self._scores = np.zeros(len(self._estimates))
        self._traffic = RoutingProfile(*shape, _HALF_LIVES[0])
        if profile is not None:
            known = profile.tokens(Phase.DECODE) + profile.tokens(Phase.PREFILL)
            if known:
                self._traffic.merge(profile)
                self._traffic.scale(min(1.0, _HALF_LIVES[1] / known))

    def observe(self, rows_LE: Floats, touched_LE: Floats, tokens: float, steps: float, phase: Phase) -> None:
        """Take in the counts of some steps of one phase, and score how well each estimate foretold them.

        Decoded tokens are foretold by what was counted before them. A prompt's tokens are foretold by all of its others
        too (leaving one out), since a prompt shows at once whether its subject is the one before.
        """
        if phase is Phase.DECODE:
            self._score(rows_LE, tokens, self._estimates)
        if phase is Phase.PREFILL:
            self._memories[-1].scale((1.0 - 1.0 / self._batch()) ** steps)
        for memory in (*self._memories, self._traffic):
            memory.record_counts(rows_LE, touched_LE, tokens, steps, phase)
        self._estimates = self._all_estimates()
        if phase is Phase.PREFILL:
            self._score(rows_LE, tokens, self._all_estimates(without=np.minimum(rows_LE, 1.0)))

    @property
    def best(self) -> int:
        """Index of the estimate that did best, or of all memories together as long as nothing was decoded."""
        return int(np.argmax(self._scores))

    def rates(self) -> Floats:
        """Return the expected tokens of each expert for each token [L, E]; a layer's add up to top_k."""
        return self._estimates[self.best]

    def demand(self) -> Demand:
        """Return the expected traffic of the next decode steps, and its share of prefill as in the last tokens."""
        traffic, rates = self._traffic, self.rates()
        steps, prefills = traffic.steps(Phase.DECODE), traffic.steps(Phase.PREFILL)
        batch = self._batch()
        prompt = traffic.tokens(Phase.PREFILL) / prefills if prefills else 0.0
        rows, touched = traffic.rows(Phase.DECODE), traffic.touched(Phase.DECODE)
        expected = rates * batch
        # Rows for each touched step: as counted, with the independent case standing for as many touches as 16 steps.
        independent = np.maximum(1.0 - np.exp(-expected.astype(np.float32)), 1e-12)
        per_touch = (rows + 16 * expected) / (touched + 16 * independent)
        touches = np.minimum(expected / np.maximum(per_touch, 1.0), 1.0)
        mean_rows = float(expected.sum() / touches.sum())
        return Demand(touches, mean_rows, rates * prompt, prefills / steps if steps else 0.0)

    def _batch(self) -> float:
        """Return the tokens of a decode step, about as many as there are requests."""
        steps = self._traffic.steps(Phase.DECODE)
        return max(self._traffic.tokens(Phase.DECODE) / steps, 1.0) if steps else 1.0

    def _score(self, rows_LE: Floats, tokens: float, estimates: list[Floats]) -> None:
        self._scores *= 2.0 ** (-tokens / _SCORE_HALF_LIFE)
        for index, estimate in enumerate(estimates):
            self._scores[index] += float((rows_LE * np.log(estimate)).sum())

    def _all_estimates(self, without: Floats | float = 0.0) -> list[Floats]:
        found = []
        counts = [m.rows(Phase.DECODE) + m.rows(Phase.PREFILL) - without for m in self._memories]
        tokens = [m.tokens(Phase.DECODE) + m.tokens(Phase.PREFILL) for m in self._memories]
        for prior_tokens in _PRIORS:
            estimate = self._prior
            for count, seen in zip(counts, tokens, strict=True):
                estimate = (prior_tokens * estimate + count) / (prior_tokens + seen)
                found.append(self._floored(estimate))
        # The first is the choice without scores: all memories, with the middle prior.
        return [found[len(counts) - 1], *found[: len(counts) - 1], *found[len(counts) :], self._prior]

    def _of_profile(self, profile: RoutingProfile) -> Floats:
        rows = profile.rows(Phase.DECODE) + profile.rows(Phase.PREFILL)
        tokens = profile.tokens(Phase.DECODE) + profile.tokens(Phase.PREFILL)
        return self._floored(rows / tokens) if tokens else self._uniform

    def _floored(self, rates: Floats) -> Floats:
        result: Floats = (1 - _FLOOR) * rates + _FLOOR * self._uniform
        return result
