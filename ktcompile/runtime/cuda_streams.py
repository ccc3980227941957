"""The streams of a GPU: a thin layer on torch.cuda."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ktcompile.runtime.streams import Mark

# The time between two events is in milliseconds of fp32: over longer times it is no longer exact to some microseconds.
_OLDEST = 30.0


@dataclass(frozen=True, slots=True)
class _Point:
    """A CUDA event that was recorded."""

    event: Any

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class _CudaStream:
    """A CUDA stream. sleeps: threads that wait for its marks leave their core to others, and wake up later."""

    def __init__(self, cuda: Any, stream: Any, *, sleeps: bool) -> None:
        self._cuda, self._stream, self._sleeps = cuda, stream, sleeps

    def run(self) -> AbstractContextManager[None]:
        within: AbstractContextManager[None] = self._cuda.stream(self._stream)
        return within

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _Point)
        self._stream.wait_event(mark.event)

    def keep(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._stream)

    def mark(self) -> _Point:
        event = self._cuda.Event(enable_timing=True, blocking=self._sleeps)
        event.record(self._stream)
        return _Point(event)


class CudaStreams:
    """Streams of one GPU. cuda: torch.cuda, for which tests have another. Nothing here waits for the whole device."""

    def __init__(self, device: torch.device, cuda: ModuleType | Any = torch.cuda) -> None:
        self.device, self._cuda = device, cuda
        self.copy_in = _CudaStream(cuda, cuda.Stream(device), sleeps=True)
        self.copy_out = _CudaStream(cuda, cuda.Stream(device), sleeps=True)
        # A stream of its own: the CPU waits for what a call sends, which should not queue behind experts.
        self.fetch = _CudaStream(cuda, cuda.Stream(device), sleeps=False)
        # Nothing is ever done on it, so that an event is reached when it is recorded.
        self._clock = _CudaStream(cuda, cuda.Stream(device), sleeps=False)
        self._reference: tuple[_Point, float] | None = None

    @property
    def compute(self) -> _CudaStream:
        """The current stream of the calling thread."""
        return _CudaStream(self._cuda, self._cuda.current_stream(self.device), sleeps=True)

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return pinned memory. torch's allocator does not hand it out again before copies from it have ended."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def when(self, mark: Mark) -> float | None:
        """Return when a mark was reached, by time.perf_counter; None: it is not."""
        assert isinstance(mark, _Point)
        if not mark.done():
            return None
        if self._reference is None or time.perf_counter() - self._reference[1] > _OLDEST:
            now = self._clock.mark()
            now.wait()
            self._reference = now, time.perf_counter()
        point, at = self._reference
        return at + float(point.event.elapsed_time(mark.event)) / 1e3
