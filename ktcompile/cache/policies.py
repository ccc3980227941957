"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ktcompile.cache.leaf_first import LeafFirst, Rule
from ktcompile.cache.lru import Lru
from ktcompile.cache.policy import Limits, Policy

_RULES: dict[str, Callable[[], Rule[Any]]] = {"lru": Lru}
NAMES = tuple(_RULES)


def make(name: str, limits: Limits) -> Policy[Any]:
    """Return an empty policy for keys of any one type. ValueError: its name is unknown."""
    if name not in _RULES:
        raise ValueError(f"policy {name!r} is unknown; there are {', '.join(NAMES)}")
    return LeafFirst(limits, _RULES[name]())
