"""Copies of experts between the CPU and a GPU, which do not hold up who asks for them."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.triton.transport import ExpertLayout, ExpertSlot
from ktcompile.runtime.device import CopyError
from ktcompile.runtime.streams import Mark, Stream, Streams

# While the link reads one, the CPU fills the next; more would only pin memory.
_BUFFERS = 3

Slot = tuple[ExpertSlot, ExpertSlot]


class ExpertCopies:
    """Copies of one device. Each direction has a thread, which moves bytes within the CPU's memory, and a stream."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._in, self._out = _Staging(streams), _Staging(streams)
        self._sender, self._receiver = (ThreadPoolExecutor(1, f"ktcompile-{name}") for name in ("send", "receive"))

    def send(self, layout: ExpertLayout, expert: int, source: PackedExperts, slot: Slot, after: Mark) -> ExpertCopy:
        """Begin to copy an expert of the CPU's to a slot, which is written to after a point in other work."""
        return ExpertCopy(self._sender.submit(self._send, layout, expert, source, slot, after))

    def receive(self, layout: ExpertLayout, expert: int, target: PackedExperts, slot: Slot) -> ExpertCopy:
        """Begin to copy what is in a slot to the CPU's place for an expert. All that wrote to the slot is done."""
        return ExpertCopy(self._receiver.submit(self._receive, layout, expert, target, slot))

    def _send(self, layout: ExpertLayout, expert: int, source: PackedExperts, slot: Slot, after: Mark) -> Mark:
        staging, stream = self._in.take(layout.nbytes), self._streams.copy_in
        source.native.read(expert, staging.data_ptr())
        stream.after(after)
        with stream.run():
            layout.unpack(staging.to(self._streams.device, non_blocking=True), *slot)
        return self._in.give_back(staging, stream)

    def _receive(self, layout: ExpertLayout, expert: int, target: PackedExperts, slot: Slot) -> Mark:
        staging, stream = self._out.take(layout.nbytes), self._streams.copy_out
        with stream.run():
            staging.copy_(layout.pack(*slot), non_blocking=True)
        arrived = self._out.give_back(staging, stream)
        arrived.wait()
        target.native.write(expert, staging.data_ptr())
        return arrived


class ExpertCopy:
    """The end of an expert's copy."""

    def __init__(self, begun: Future[Mark]) -> None:
        self._begun = begun

    def done(self) -> bool:
        """Return whether the copy has ended. CopyError: it failed."""
        if not self._begun.done():
            return False
        try:
            return self._begun.result().done()
        except Exception as error:
            raise _failed(error) from error

    def wait(self) -> None:
        """Return once the copy has ended. CopyError: it failed."""
        try:
            self._begun.result().wait()
        except Exception as error:
            raise _failed(error) from error


class _Staging:
    """A few buffers that copies take turns with, of one thread."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._given_back: deque[tuple[torch.Tensor, Mark]] = deque()

    def take(self, size: int) -> torch.Tensor:
        """Return memory of the CPU for the next copy, once the one before that used it has ended."""
        if len(self._given_back) < _BUFFERS:
            return self._streams.staging((size,), torch.uint8)
        buffer, mark = self._given_back.popleft()
        mark.wait()
        return buffer if len(buffer) == size else self._streams.staging((size,), torch.uint8)

    def give_back(self, buffer: torch.Tensor, stream: Stream) -> Mark:
        """Return the point after which the buffer is no longer in use."""
        mark = stream.mark()
        self._given_back.append((buffer, mark))
        return mark


def _failed(error: Exception) -> CopyError:
    return CopyError(str(error) or type(error).__name__)
