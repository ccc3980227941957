"""Which module a parameter belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ktcompile.ops.modules import alive_modules


class Owner(NamedTuple):
    module: nn.Module
    name: str


class ParameterOwners:
    """Finds the module of a parameter. Dynamo hands a backend parameters, not modules; one pass over the
    garbage collector's objects finds every module of the process without touching Dynamo's internals. That takes a
    tenth of a second, so that there is one for each graph."""

    def __init__(self) -> None:
        self._owners: dict[int, Owner] | None = None

    def find(self, parameter: torch.Tensor) -> Owner | None:
        """Return the owner, or None. A parameter that several modules share has the first of them."""
        if self._owners is None:
            self._owners = {}
            for candidate in alive_modules():
                for name, value in candidate._parameters.items():
                    self._owners.setdefault(id(value), Owner(candidate, name))
        return self._owners.get(id(parameter))
