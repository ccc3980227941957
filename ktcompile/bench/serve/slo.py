"""Objectives of latency, and whether a request met them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ktcompile.bench.serve.outcome import OK, Outcome

# itl: of the gaps between a request's tokens, the longest but for one in a hundred.
NAMES = ("ttft", "itl", "tpot", "e2e")
_UNITS = {"ms": 1e-3, "s": 1.0}


def parse(text: str) -> dict[str, float]:
    """Return seconds by name, of a text such as ttft=500ms,itl=80ms. ValueError: it is something else."""
    result = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d+(?:\.\d+)?)(ms|s)\s*", part)
        if match is None or match[1] not in NAMES:
            raise ValueError(f"--slo has {part!r}; write NAME=500ms or NAME=0.5s, with a name of {', '.join(NAMES)}")
        result[match[1]] = float(match[2]) * _UNITS[match[3]]
    return result


def met(outcome: Outcome, slo: Mapping[str, float]) -> bool:
    """Return whether a request ended well and within all objectives."""
    if outcome.status != OK:
        return False
    gaps = outcome.gaps()
    values = {
        "ttft": outcome.ttft,
        "e2e": outcome.e2e,
        "tpot": outcome.tpot or 0.0,
        "itl": float(np.quantile(gaps, 0.99)) if gaps else 0.0,
    }
    return all(values[name] <= most for name, most in slo.items())
