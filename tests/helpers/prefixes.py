"""A prompt of several blocks, and engines that note what their model gives."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.engines import SMALL, Answer, check_empty, prompts, run_all
from ktcompile.engine.engine import Engine
from ktcompile.engine.runner import StepLogits
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.scheduler.batch import Step

SIZE = SMALL["block_size"]
LENGTH = 12
GREEDY = SamplingParams(LENGTH, 0.0, ignore_eos=True)
DRAWN = SamplingParams(LENGTH, 1.2, 0.9, seed=7, ignore_eos=True)
PROMPT = [*prompts(1, longest=60)[0], *range(40)][:50]

Logits = dict[int, Tensor]  # by position


class Watched:
    """An engine, with the logits that its model gives. cached: tokens that answers did not compute when they began."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.logits: dict[str, Logits] = {}
        self.cached: dict[str, int] = {}
        self._run = engine._runner.run
        engine._runner.run = self.run  # type: ignore[method-assign]

    def run(self, step: Step) -> StepLogits:
        self.cached |= {start.request_id: start.num_cached_tokens for start in step.started}
        found = self._run(step)
        for i, chunk in enumerate(step.chunks):
            rows = found.values[found.places[i] : found.places[i + 1]].clone()
            self.logits.setdefault(chunk.request_id, {}).update(zip(range(chunk.logits_from, chunk.end), rows))  # noqa: B905
        return found

    def serve(self, *given: tuple[list[int], SamplingParams], salt: str) -> list[Answer]:
        """Return all answers to requests that come together, named 0, 1 and so on."""
        self.logits.clear()
        for number, (prompt, params) in enumerate(given):
            self.engine.add(str(number), prompt, params, cache_salt=salt)
        answers = run_all(self.engine)
        check_empty(self.engine)
        return [answers[str(number), index] for number, (_, params) in enumerate(given) for index in range(params.n)]


def same(found: Logits, expected: Logits) -> bool:
    """Whether logits are, bit for bit, at all positions that both have."""
    common = found.keys() & expected.keys()
    assert len(common) >= LENGTH
    return all(torch.equal(found[position], expected[position]) for position in common)
