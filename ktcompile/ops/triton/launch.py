"""One launch of a kernel, as a value: run here, compiled ahead of time in the tests."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs

INTERPRET = "INTERPRET"
# Kernels are compiled or interpreted as this said when their modules were imported.
_IS_INTERPRETED = bool(knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, its grid, its arguments in order, its constants, and how many warps and stages it is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[torch.Tensor | int | float, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """Return the compiler's options. Whether multiply and add are fused is said, since its default changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on the current stream of its first argument's device. An empty grid does nothing."""
        if 0 in self.grid:
            return
        options = self.constants | self.options
        if INTERPRET in self.kernel.arg_names:
            options[INTERPRET] = _IS_INTERPRETED
        first = self.arguments[0]
        assert isinstance(first, torch.Tensor)
        is_current = not first.is_cuda or first.get_device() == torch.cuda.current_device()
        with nullcontext() if is_current else torch.cuda.device(first.device):
            self.kernel[self.grid](*self.arguments, **options)


def power_of_2(n: int) -> int:
    """Return the least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
