"""What the routers of a model choose, as files: a trace, which has each step, and a profile, which has sums.

Shape suffixes: S steps, L layers, E experts, T tokens, K top_k.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.observer import observing
from ktcompile.plan.files import check_writable
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.trace import Trace
from ktcompile.runtime.adaptive import phase_of

# Tokens after which a profile's counts weigh half: what was asked in a few days' use, not in a year's.
HALF_LIFE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One call of all layers. rows: tokens of each expert [L, E]."""

    rows: NDArray[np.int64]
    tokens: int

    @property
    def phase(self) -> Phase:
        return phase_of(self.tokens)


class Steps:
    """An observer that makes steps out of the calls of one model's layers.

    Layers are numbered as they come. A step ends when a layer comes again, or with `end`; one that lacks layers which
    other steps had was broken off, and is dropped. take: is given each step.
    """

    def __init__(self, take: Callable[[Step], None]) -> None:
        self._take = take
        self._numbers: dict[int, int] = {}
        self._sizes: list[int] = []
        self._ids: dict[int, Any] = {}
        self._tokens = 0
        self._lock = threading.Lock()

    def __call__(self, experts: PackedExperts, ids_TK: torch.Tensor) -> None:
        tokens = ids_TK.shape[0]
        if not tokens:
            return
        # Copies: layers wait for this, and counting can wait until the step ends. A few numbers make a list sooner.
        ids = ids_TK.tolist() if phase_of(tokens) is Phase.DECODE else ids_TK.numpy().flatten()
        with self._lock:
            number = self._numbers.setdefault(experts.number, len(self._numbers))
            if number == len(self._sizes):
                self._sizes.append(experts.num_experts)
            if number in self._ids:
                self._end()
            self._ids[number], self._tokens = ids, tokens

    def end(self) -> None:
        """Take the last step, since no other comes."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if len(self._ids) == len(self._numbers) > 0:
            self._take(Step(self._rows(), self._tokens))
        self._ids = {}

    def _rows(self) -> NDArray[np.int64]:
        """Return the tokens of each expert in the step [L, E]."""
        parts = [np.ravel(ids) for ids in self._ids.values()]
        sizes, ids = np.array(self._sizes), np.concatenate(parts)
        layers = np.repeat(list(self._ids), [len(part) for part in parts])
        known = ids < sizes[layers]
        flat = layers[known] * sizes.max() + ids[known]
        return np.bincount(flat, minlength=len(sizes) * sizes.max()).reshape(len(sizes), -1)


class TraceLog:
    """Keeps the used experts of each step: a few bytes for each layer, token and expert."""

    def __init__(self) -> None:
        self._steps: list[Trace] = []

    def add(self, step: Step) -> None:
        prefill = step.phase is Phase.PREFILL
        self._steps.append(Trace.of_counts(step.rows[None], [step.tokens], [prefill]))

    def trace(self) -> Trace | None:
        """Return the trace of all steps, None if there were none. ValueError: they were not of one model."""
        if not self._steps:
            return None
        shapes = {(s.num_layers, s.num_experts) for s in self._steps}
        if len(shapes) > 1:
            raise ValueError(f"steps of several models were recorded, with {sorted(shapes)} layers and experts")
        ends = np.cumsum([len(s.experts) for s in self._steps])
        begins = ends - [len(s.experts) for s in self._steps]
        offsets = [np.zeros(1, dtype=np.int64)]
        offsets += [s.offsets[1:] + begin for s, begin in zip(self._steps, begins, strict=True)]
        parts = (np.concatenate([getattr(s, n) for s in self._steps]) for n in ("experts", "rows", "tokens", "prefill"))
        return Trace(*shapes.pop(), np.concatenate(offsets), *parts)


class Recording:
    """Records what the routers of one model choose while it is entered, and saves it.

    trace: a file that is written anew. profile: a file to which is added; what it had fades with what is added. None:
    there is no such file to write. ValueError, FileNotFoundError: they cannot be written, or the profile's cannot be
    read.
    """

    def __init__(self, trace: Path | None = None, profile: Path | None = None) -> None:
        self._paths = [path for path in (trace, profile) if path is not None]
        for path in self._paths:
            check_writable(path)
        self._trace_path, self._profile_path = trace, profile
        self._before = RoutingProfile.load(profile) if profile is not None and profile.exists() else None
        self._counted: RoutingProfile | None = None
        self._tokens = 0
        self._log = TraceLog()
        self._steps = Steps(self._add)

    def check(self, shape: tuple[int, int]) -> None:
        """ValueError: a model of so many layers and experts cannot be recorded, or the profile is another model's."""
        if not self._paths:
            return
        if not shape[0]:
            raise ValueError("the model has no experts whose routing could be recorded")
        if self._before is not None and self._before.shape != shape:
            raise ValueError(
                f"{self._profile_path} is of {self._before.shape} layers and experts; the model has {shape}"
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record for a while."""
        with observing(self._steps) if self._paths else contextlib.nullcontext():
            yield

    def save(self) -> list[Path]:
        """Write the files, each whole or not at all, and return those for which there was anything to write.

        ValueError: one cannot be written; the other is.
        """
        self._steps.end()
        written, problems = [], list[ValueError]()
        for path, write in ((self._trace_path, self._save_trace), (self._profile_path, self._save_profile)):
            try:
                if path is not None and write(path):
                    written.append(path)
            except ValueError as error:
                problems.append(error)
        if problems:
            raise ValueError("; ".join(map(str, problems)))
        return written

    def _add(self, step: Step) -> None:
        if self._trace_path is not None:
            self._log.add(step)
        if self._profile_path is not None:
            if self._counted is None:
                layers, experts = step.rows.shape
                self._counted = RoutingProfile(layers, experts, self._half_life())
            self._tokens += step.tokens
            self._counted.record_counts(step.rows, np.minimum(step.rows, 1), step.tokens, 1, step.phase)

    def _save_trace(self, path: Path) -> bool:
        trace = self._log.trace()
        if trace is None:
            return False
        trace.save(path)
        return True

    def _save_profile(self, path: Path) -> bool:
        if self._counted is None:
            return False
        result = self._counted.copy(self._half_life())
        if self._before is not None:
            earlier = self._before.copy(self._half_life())
            earlier.scale(2.0 ** -(self._tokens / self._half_life()))
            result.merge(earlier)
        result.save(path)
        return True

    def _half_life(self) -> float:
        return (self._before.half_life if self._before else None) or HALF_LIFE
