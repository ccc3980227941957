"""Sizes of memory as users write them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}{b}": 1000 ** (i + 1) for i, p in enumerate("KMGT") for b in ("", "B")}
_UNITS |= {f"{p}I{b}": 1024 ** (i + 1) for i, p in enumerate("KMGT") for b in ("", "B")}


def size(text: str) -> int:
    """Return the bytes of a size such as 24GB, 22.5GiB or 800000. An argparse type.

    ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 24GB, 22.5GiB, 800MB or 1TB")
    return round(float(match[1]) * unit)


def human(size_bytes: float) -> str:
    """Return a size in GB, or in MB where it is small."""
    return f"{size_bytes / 1e9:,.1f} GB" if abs(size_bytes) >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"
