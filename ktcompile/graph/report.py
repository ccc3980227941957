"""What a compilation did, for people and for tests."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class PassReport:
    """One pass over one graph: its time in seconds and how many places it changed."""

    name: str
    seconds: float
    matches: int


@dataclass(slots=True)
class CompileReport:
    """One graph that the backend was given.

    moe_found: MoE layers in it. moe_fused: those that run on ktcompile's kernels. fallbacks: why each other one
    does not, as sentences. attention_fused: calls of attention that run on ktcompile's kernels. attention_fallbacks:
    why each that is left to scaled_dot_product_attention does not. passes: in the order in which they ran. inner: who
    compiled the rest of the graph.
    """

    inner: str
    moe_fused: int = 0
    fallbacks: list[str] = field(default_factory=list)
    attention_fused: int = 0
    attention_fallbacks: list[str] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)

    @property
    def moe_found(self) -> int:
        return self.moe_fused + len(self.fallbacks)


# The newest ones only: a process that compiles forever must not grow.
_reports: deque[CompileReport] = deque(maxlen=256)


def record(report: CompileReport) -> None:
    _reports.append(report)


def compile_reports() -> list[CompileReport]:
    """Return the reports of the graphs compiled in this process, oldest first, the newest 256 at most."""
    return list(_reports)


def clear_compile_reports() -> None:
    _reports.clear()
