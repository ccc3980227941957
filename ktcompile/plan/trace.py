"""Routing traces: how many tokens each expert had, step by step and layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktcompile.plan.profile import Phase, RoutingProfile, read_npz, write_whole

_VERSION = 1
_ARRAYS = ("offsets", "experts", "rows", "tokens", "prefill")


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Token counts of used experts only; step s and layer l have those from offsets[s * L + l] to the next offset.

    experts, rows: ids, ascending within a layer, and their tokens (at least 1). tokens [S]: of each step.
    prefill [S]: whether the step is a prompt's. ValueError: the arrays contradict each other.
    """

    num_layers: int
    num_experts: int
    offsets: NDArray[np.int64]
    experts: NDArray[np.uint16]
    rows: NDArray[np.uint32]
    tokens: NDArray[np.int64]
    prefill: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.num_layers < 1 or not 1 <= self.num_experts <= 2**16:
            raise ValueError(f"a trace of {self.num_layers} layers and {self.num_experts} experts cannot be")
        if self.tokens.ndim != 1 or self.prefill.shape != self.tokens.shape:
            raise ValueError(f"{self.tokens.shape} token counts do not fit {self.prefill.shape} kinds of steps")
        if self.offsets.shape != (self.num_steps * self.num_layers + 1,):
            raise ValueError(
                f"{self.offsets.shape} offsets do not fit {self.num_steps} steps of {self.num_layers} layers"
            )
        if self.experts.ndim != 1 or self.experts.shape != self.rows.shape:
            raise ValueError(f"{self.experts.shape} ids do not fit {self.rows.shape} counts")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.experts) or (np.diff(self.offsets) < 0).any():
            raise ValueError("offsets do not ascend from 0 to the number of entries")
        if len(self.experts) and (self.experts.max() >= self.num_experts or self.rows.min() < 1):
            raise ValueError(f"ids must be 0 to {self.num_experts - 1}, and their counts at least 1")
        if len(self.tokens) and self.tokens.min() < 1:
            raise ValueError("a step has no tokens")

    @property
    def num_steps(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_counts(cls, rows_SLE: Any, tokens: Any, prefill: Any) -> Trace:
        """Return the trace of token counts [S, L, E], tokens [S] and kinds of steps [S]."""
        dense = np.asarray(rows_SLE)
        steps, layers, experts = dense.shape
        slot, expert = np.nonzero(dense.reshape(steps * layers, experts))
        offsets = np.zeros(steps * layers + 1, dtype=np.int64)
        np.cumsum(np.bincount(slot, minlength=steps * layers), out=offsets[1:])
        rows = dense.reshape(steps * layers, experts)[slot, expert].astype(np.uint32)
        return cls(
            layers,
            experts,
            offsets,
            expert.astype(np.uint16),
            rows,
            np.asarray(tokens, dtype=np.int64),
            np.asarray(prefill, dtype=np.bool_),
        )

    def counts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the token counts of steps [begin, end) as an array [S, L, E]."""
        low, high = begin * self.num_layers, end * self.num_layers
        first, last = self.offsets[low], self.offsets[high]
        slot = np.repeat(np.arange(high - low), np.diff(self.offsets[low : high + 1]))
        dense = np.zeros((high - low, self.num_experts), dtype=np.int64)
        dense[slot, self.experts[first:last]] = self.rows[first:last]
        return dense.reshape(end - begin, self.num_layers, self.num_experts)

    def profile(self, half_life: float | None = None) -> RoutingProfile:
        """Return what a profile has counted after all steps of the trace."""
        result = RoutingProfile(self.num_layers, self.num_experts, half_life)
        for begin, end in self.runs(64):
            counts = self.counts(begin, end)
            phase = Phase.PREFILL if self.prefill[begin] else Phase.DECODE
            tokens = float(self.tokens[begin:end].sum())
            result.record_counts(counts.sum(0), (counts > 0).sum(0), tokens, end - begin, phase)
        return result

    def runs(self, longest: int) -> Iterator[tuple[int, int]]:
        """Give [begin, end) of the intervals between which placement may change: each prefill step, and decode steps
        in a row, of which `longest` at most."""
        begin = 0
        while begin < self.num_steps:
            end = begin + 1
            if not self.prefill[begin]:
                while end < min(begin + longest, self.num_steps) and not self.prefill[end]:
                    end += 1
            yield begin, end
            begin = end

    def save(self, path: Path) -> None:
        """Write the trace into `path`, an npz file, whole or not at all. ValueError: it cannot be written."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        shape = np.array([self.num_layers, self.num_experts])
        write_whole(path, lambda file: np.savez_compressed(file, version=_VERSION, shape=shape, **arrays))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Return the trace of a file that `save` wrote. ValueError: it is none, or damaged."""
        values = read_npz(path, "a routing trace")
        try:
            if int(values["version"]) != _VERSION:
                raise ValueError(f"its version is {int(values['version'])}, not {_VERSION}")
            layers, experts = (int(n) for n in values["shape"])
            return cls(layers, experts, *(values[name] for name in _ARRAYS))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is not a routing trace: {error}") from error
