"""Policies by name."""

from __future__ import annotations

from typing import Any

from ktcompile.cache.contest import Contest
from ktcompile.cache.costs import Worth
from ktcompile.cache.leaf_first import LeafFirst, Rule
from ktcompile.cache.lru import Lru
from ktcompile.cache.policy import Limits, Policy
from ktcompile.cache.tinylfu import WTinyLfu
from ktcompile.cache.value import Value

# The first is the default.
NAMES = ("value", "wtinylfu", "lru")


def make(name: str, limits: Limits, worth: Worth | None = None) -> Policy[Any]:
    """Return an empty policy for keys of any one type. worth: what a hit saves; only `value` looks at it.

    ValueError: the name is unknown.
    """
    rule: Rule[Any]
    if name == "value":
        return Contest(limits, Value(worth))
    if name == "wtinylfu":
        rule = WTinyLfu(limits.capacity)
    elif name == "lru":
        rule = Lru()
    else:
        raise ValueError(f"policy {name!r} is unknown; there are {', '.join(NAMES)}")
    return LeafFirst(limits, rule)
