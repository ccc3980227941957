"""How a contender's name says which formats its weights have."""

from __future__ import annotations

from typing import Any

_OPTIONS = ("weight_format", "dense_format", "head_format")


def formats_of(variant: str) -> dict[str, Any]:
    """Return options of the backend and of engines by name. variant: EXPERTS+LINEAR+HEAD, of which the last may be left
    out; "": as in the model."""
    return {name: given or "auto" for name, given in zip(_OPTIONS, variant.split("+"), strict=False)}
