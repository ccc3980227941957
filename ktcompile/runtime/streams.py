"""Streams: work of a device that is begun at once and done in its order, and points in it.

`ktcompile.runtime.cuda_streams` has those of a GPU. Those of the CPU, here, let what is written for one run without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in the work of a stream."""

    def done(self) -> bool:
        """Return whether the work before it is done."""
        ...

    def wait(self) -> None:
        """Return once the work before it is done. No other work is waited for."""
        ...


class Stream(Protocol):
    """Work that is done in the order in which it is begun."""

    def run(self) -> AbstractContextManager[None]:
        """Let what is begun inside be this stream's."""
        ...

    def after(self, mark: Mark) -> None:
        """Let what this stream is given from now on wait for a point in another's work."""
        ...

    def keep(self, tensor: torch.Tensor) -> None:
        """Let the memory of another stream's tensor not be used again before this one is done with it."""
        ...

    def mark(self) -> Mark:
        """Return the point that the work of this stream has come to, as far as it was begun."""
        ...


class Streams(Protocol):
    """The streams of one device: of experts that come and that leave, of what calls send to the CPU, of the rest."""

    @property
    def device(self) -> torch.device: ...

    @property
    def copy_in(self) -> Stream: ...

    @property
    def copy_out(self) -> Stream: ...

    @property
    def fetch(self) -> Stream: ...

    @property
    def compute(self) -> Stream:
        """The stream on which the caller computes."""
        ...

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the CPU that copies of this device do not wait for. What they read stays there until then,
        even if the tensor is gone."""
        ...

    def when(self, mark: Mark) -> float | None:
        """Return when a mark was reached, by time.perf_counter; None: it is not."""
        ...


@dataclass(frozen=True, slots=True)
class _Moment:
    """A mark that is reached when it is made."""

    at: float = field(default_factory=time.perf_counter)

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class _CpuStream:
    """A stream whose work is done when it is begun."""

    @contextmanager
    def run(self) -> Iterator[None]:
        yield

    def after(self, mark: Mark) -> None:
        assert mark.done()

    def keep(self, tensor: torch.Tensor) -> None:
        pass

    def mark(self) -> Mark:
        return _Moment()


class CpuStreams:
    """The streams of the CPU: there is but one."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.copy_in = self.copy_out = self.fetch = self.compute = _CpuStream()

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory."""
        return torch.empty(shape, dtype=dtype)

    def when(self, mark: Mark) -> float | None:
        """Return when a mark was made."""
        assert isinstance(mark, _Moment)
        return mark.at
