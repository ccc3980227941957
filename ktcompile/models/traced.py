"""Functions that Dynamo runs as it traces, and whose results it then takes for constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ktcompile.log import warn_once

_Function = TypeVar("_Function", bound=Callable[..., Any])


def run_as_traced(function: _Function) -> _Function:
    """Mark a function as `torch.compiler.assume_constant_result` does, which imports Dynamo first: two seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@run_as_traced
def note(message: str) -> None:
    """Log a message once."""
    warn_once(message)
