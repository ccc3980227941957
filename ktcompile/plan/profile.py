"""Counters of which experts tokens were routed to, with decay, and their files."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]

_VERSION = 1
# Weights of new tokens grow instead of all counters shrinking; long before they overflow, counters are scaled.
_LARGEST_WEIGHT = 1e60
_ARRAYS = ("rows", "touched", "tokens", "steps")


class Phase(IntEnum):
    """Which counters a step belongs to: a few tokens of each request, or a whole prompt."""

    DECODE = 0
    PREFILL = 1


class RoutingProfile:
    """Decayed counters of a model's routing, decode and prefill apart.

    half_life: tokens after which what was counted weighs half; None: nothing decays.
    """

    def __init__(self, num_layers: int, num_experts: int, half_life: float | None = None) -> None:
        if num_layers < 1 or num_experts < 1:
            raise ValueError(f"a profile of {num_layers} layers and {num_experts} experts counts nothing")
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life is {half_life}; it must be positive")
        self.half_life = half_life
        self._rows = np.zeros((2, num_layers, num_experts))
        self._touched = np.zeros((2, num_layers, num_experts))
        self._totals = np.zeros((2, 2))  # [tokens or steps, phase]
        self._weight = 1.0
        self._first = (np.arange(num_layers) * num_experts)[:, None]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and experts."""
        return self._rows.shape[1], self._rows.shape[2]

    def rows(self, phase: Phase) -> Floats:
        """Return how many tokens were routed to each expert [L, E]."""
        rows: Floats = self._rows[phase] / self._weight
        return rows

    def touched(self, phase: Phase) -> Floats:
        """Return in how many steps each expert had a token at all [L, E]."""
        touched: Floats = self._touched[phase] / self._weight
        return touched

    def tokens(self, phase: Phase) -> float:
        """Return how many tokens were seen."""
        return float(self._totals[0, phase] / self._weight)

    def steps(self, phase: Phase) -> float:
        """Return how many steps were seen."""
        return float(self._totals[1, phase] / self._weight)

    def record(self, topk_ids_LTK: Ints, phase: Phase = Phase.DECODE) -> None:
        """Count one step, given the experts of each token in each layer [L, T, K]. It is meant for each decode step.

        ValueError: another number of layers, or ids out of range.
        """
        layers, tokens = topk_ids_LTK.shape[:2]
        if layers != self.shape[0]:
            raise ValueError(f"the step has {layers} layers; the profile has {self.shape[0]}")
        if not topk_ids_LTK.size:
            return
        ids = topk_ids_LTK.reshape(layers, -1)
        if ids.min() < 0 or ids.max() >= self.shape[1]:
            raise ValueError(f"ids of experts must be 0 to {self.shape[1] - 1}")
        self._decay(tokens)
        flat = (ids + self._first).ravel()
        # Fancy indexing adds once where an index repeats, which is what `touched` counts.
        self._touched[phase].reshape(-1)[flat] += self._weight
        if tokens == 1:
            self._rows[phase].reshape(-1)[flat] += self._weight
        else:
            np.add.at(self._rows[phase].reshape(-1), flat, self._weight)
        self._totals[:, phase] += (tokens * self._weight, self._weight)

    def record_counts(
        self, rows_LE: Ints | Floats, touched_LE: Ints | Floats, tokens: float, steps: float, phase: Phase
    ) -> None:
        """Count several steps at once, which then decay alike. ValueError: another shape, or counts below zero."""
        for counts in (rows_LE, touched_LE):
            if counts.shape != self.shape:
                raise ValueError(f"counts have shape {counts.shape}; the profile has {self.shape}")
        if tokens < 0 or steps < 0 or rows_LE.min() < 0 or touched_LE.min() < 0:
            raise ValueError("counts must not be negative")
        self._decay(tokens)
        self._rows[phase] += rows_LE * self._weight
        self._touched[phase] += touched_LE * self._weight
        self._totals[:, phase] += (tokens * self._weight, steps * self._weight)

    def merge(self, other: RoutingProfile) -> None:
        """Add what another profile of the same model counted. ValueError: its shape differs."""
        if other.shape != self.shape:
            raise ValueError(f"a profile of {other.shape} cannot be merged into one of {self.shape}")
        scale = self._weight / other._weight
        self._rows += other._rows * scale
        self._touched += other._touched * scale
        self._totals += other._totals * scale

    def scale(self, factor: float) -> None:
        """Multiply all counts; 0 forgets them. ValueError: the factor is negative."""
        if not factor >= 0:
            raise ValueError(f"counts cannot be multiplied by {factor}")
        for array in (self._rows, self._touched, self._totals):
            array *= factor

    def copy(self, half_life: float | None) -> RoutingProfile:
        """Return a profile with the same counts that decays by another half-life from now on."""
        result = RoutingProfile(*self.shape, half_life)
        result.merge(self)
        return result

    def save(self, path: Path) -> None:
        """Write the counters into `path`, whole or not at all; as JSON if it ends in .json, else as npz."""
        arrays = {name: getattr(self, f"_{name}") / self._weight for name in ("rows", "touched")}
        arrays |= {"tokens": self._totals[0] / self._weight, "steps": self._totals[1] / self._weight}
        if path.suffix == ".json":
            values = {name: array.tolist() for name, array in arrays.items()}
            text = json.dumps({"version": _VERSION, "half_life": self.half_life, **values})
            write_whole(path, lambda file: file.write(text.encode()))
        else:
            half_life = np.array(self.half_life or 0.0)
            write_whole(path, lambda file: np.savez_compressed(file, version=_VERSION, half_life=half_life, **arrays))

    @classmethod
    def load(cls, path: Path, shape: tuple[int, int] | None = None) -> RoutingProfile:
        """Return the profile of a file that `save` wrote. ValueError: it is none, damaged, or not of this shape."""
        values = _read_json(path) if path.suffix == ".json" else read_npz(path, "a routing profile")
        try:
            if int(values["version"]) != _VERSION:
                raise ValueError(f"its version is {int(values['version'])}, not {_VERSION}")
            arrays = {name: np.asarray(values[name], dtype=np.float64) for name in _ARRAYS}
            half_life = float(values["half_life"] or 0.0) or None
            result = cls._of_arrays(arrays, half_life)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a routing profile: {error}") from error
        if shape is not None and result.shape != shape:
            raise ValueError(f"{path} is of {result.shape} layers and experts; the model has {shape}")
        return result

    @classmethod
    def _of_arrays(cls, arrays: dict[str, Floats], half_life: float | None) -> RoutingProfile:
        rows = arrays["rows"]
        if rows.ndim != 3 or rows.shape[0] != 2 or arrays["touched"].shape != rows.shape:
            raise ValueError(f"its counters have shapes {rows.shape} and {arrays['touched'].shape}")
        if arrays["tokens"].shape != (2,) or arrays["steps"].shape != (2,):
            raise ValueError("its totals are not those of two phases")
        if not all(np.isfinite(a).all() and (a >= 0).all() for a in arrays.values()):
            raise ValueError("a counter is negative or not a number")
        result = cls(rows.shape[1], rows.shape[2], half_life)
        result._rows, result._touched = rows.copy(), arrays["touched"].copy()
        result._totals = np.stack([arrays["tokens"], arrays["steps"]])
        return result

    def _decay(self, tokens: float) -> None:
        if self.half_life is None:
            return
        # More half-lives than this leave nothing; the power must not overflow.
        self._weight *= 2.0 ** min(tokens / self.half_life, 100.0)
        if self._weight > _LARGEST_WEIGHT:
            for array in (self._rows, self._touched, self._totals):
                array /= self._weight
            self._weight = 1.0


def write_whole(path: Path, write: Any) -> None:
    """Call `write` with a binary file that becomes `path` once it is written. ValueError: `path` cannot be written."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error
        raise


def read_npz(path: Path, what: str) -> dict[str, Any]:
    """Return the arrays of an npz file. ValueError: it is none, or damaged; FileNotFoundError: there is none."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array")
        with file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise ValueError(f"{path} is not {what}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a routing profile: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a routing profile: it holds no object")
    return values


def merged(profiles: Sequence[RoutingProfile]) -> RoutingProfile:
    """Return the sum of profiles of one model, with the half-life of the first. ValueError: none, or shapes differ."""
    if not profiles:
        raise ValueError("there is no profile to merge")
    result = profiles[0].copy(profiles[0].half_life)
    for profile in profiles[1:]:
        result.merge(profile)
    return result
