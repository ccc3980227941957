"""The device "cuda" without kernels: its order of work, its memory, its errors. `triton_checks` has the numbers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.layers import EXPERTS, random_inputs, random_layer

pytest.importorskip("triton")

from ktcompile.ops import PackedExperts
from ktcompile.ops.triton.transport import ExpertLayout
from ktcompile.plan.hardware import preset
from ktcompile.runtime import cuda_support
from ktcompile.runtime.cuda import CudaDevice
from ktcompile.runtime.cuda_streams import CudaStreams
from ktcompile.runtime.device import CopyError, DeviceMemoryError
from ktcompile.runtime.devices import Placer, device_for
from ktcompile.runtime.streams import CpuStreams

CPU = torch.device("cpu")


class FakeCuda:
    """What torch.cuda does for streams and events, as a list of what was asked for. Work is done at once, but events
    are only reached when they are let, or waited for."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.names = iter(("in", "out", "fetch", "clock"))
        self.events = 0
        self.inside = ["compute"]
        self.holding = False

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, next(self.names))

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, self.inside[-1])

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(("run", stream.name))
        yield

    def Event(self, enable_timing: bool, blocking: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self, *_: Any) -> None:
        raise AssertionError("the device was waited for")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(("after", self.name, event.stream, event.number))

    def synchronize(self) -> None:
        raise AssertionError("a stream was waited for")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.reached, self.stream, self.number = cuda, not cuda.holding, "", 0

    def record(self, stream: FakeStream) -> None:
        self.cuda.events += 1
        self.stream, self.number = stream.name, self.cuda.events
        self.cuda.log.append(("mark", self.stream, self.number))

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.cuda.log.append(("wait", self.stream, self.number))
        self.reached = True

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.number - self.number)


class Streams(CudaStreams):
    """Those of a GPU on a torch.cuda that is none, for tensors of the CPU."""

    def __init__(self) -> None:
        self.fake = FakeCuda()
        super().__init__(CPU, self.fake)

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


@pytest.fixture
def streams(monkeypatch) -> Streams:
    found = Streams()
    keep = lambda tensor, stream: found.fake.log.append(("keep", stream.name))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", keep)
    return found


def device_of(streams: Any, experts: PackedExperts, room: int) -> CudaDevice:
    return CudaDevice(room * experts.native.expert_nbytes, streams)


def test_a_copy_into_a_released_slot_waits_for_what_computes_with_it(streams):
    experts = random_layer().pack()
    memory = device_of(streams, experts, 1).experts(experts)
    memory.copy_in(0, experts).wait()
    log = streams.fake.log
    log.clear()
    memory.release(0)
    (marked,) = log
    assert marked[:2] == ("mark", "compute")
    memory.copy_in(1, experts).wait()
    waits, runs, arrived = log[1:4]
    assert waits == ("after", "in", "compute", marked[2]) and runs == ("run", "in") and arrived[:2] == ("mark", "in")
    # nothing but the copy's own end is waited for
    assert {entry for entry in log if entry[0] == "wait"} <= {("wait", "in", arrived[2])}


def test_new_memory_is_kept_from_what_had_it_before(streams):
    experts = random_layer(weight_format="int4_g32_zp", bias=True).pack()
    memory = device_of(streams, experts, 2).experts(experts)
    log = streams.fake.log
    assert log.count(("keep", "in")) == log.count(("keep", "out")) == 8  # codes, scales, zeros and bias of both weights
    made = next(entry for entry in log if entry[0] == "mark")
    log.clear()
    memory.copy_in(0, experts).wait()
    assert log[0] == ("after", "in", "compute", made[2])


def test_what_a_call_sends_waits_for_its_own_event(streams):
    experts = random_layer().pack()
    device = device_of(streams, experts, 1)
    log, inputs = streams.fake.log, random_inputs(3)
    streams.fake.holding = True
    fetched = device.fetch(*inputs)
    computed, waits, runs, *kept, arrived = log
    assert computed[:2] == ("mark", "compute") and waits == ("after", "fetch", "compute", computed[2])
    assert runs == ("run", "fetch") and kept == [("keep", "fetch")] * 3 and arrived[:2] == ("mark", "fetch")
    inputs[0].zero_()  # what comes next may overwrite what was sent
    log.clear()
    got = fetched.wait()
    assert log == [("wait", "fetch", arrived[2])] and torch.equal(got[0], random_inputs(3)[0])
    assert fetched.wait() is got and len(log) == 1


def test_times_are_those_of_the_cpus_clock(streams):
    experts = random_layer().pack()
    device = device_of(streams, experts, 1)
    begin = streams.compute.mark()
    streams.fake.holding = True
    device.fetch(torch.zeros(1))
    end = streams.compute.mark()
    assert streams.when(end) is None  # not reached
    end.event.reached = True
    before = time.perf_counter()
    ended = streams.when(end)
    after = time.perf_counter()
    # The fake's events are a millisecond apart: begin, what fetch records twice, end, that of the clock.
    assert before - 1e-3 <= ended <= after - 1e-3
    assert ended - streams.when(begin) == pytest.approx(3e-3)
    assert not any(entry[0] == "wait" for entry in streams.fake.log if entry[1] == "compute")


def test_an_expert_that_leaves_is_the_cpus_when_its_event_is_reached(streams):
    experts = random_layer(weight_format="int4_g32").pack()
    wanted = experts.unpack(3)
    memory = device_of(streams, experts, 1).experts(experts)
    memory.copy_in(3, experts).wait()
    experts.native.fill(3, 0xFF)
    streams.fake.log.clear()
    memory.copy_out(3, experts).wait()
    runs, arrived, *waits = streams.fake.log
    assert runs == ("run", "out") and arrived[:2] == ("mark", "out")
    assert waits and set(waits) == {("wait", "out", arrived[2])}
    assert all(torch.equal(a, b) for a, b in zip(experts.unpack(3), wanted, strict=True))


def test_copies_take_turns_with_a_few_buffers(streams):
    experts = random_layer().pack()
    memory = device_of(streams, experts, EXPERTS).experts(experts)
    streams.fake.holding = True
    for expert in range(EXPERTS):
        event = memory.copy_in(expert, experts)
    event.wait()
    log = streams.fake.log
    marks = [entry[2] for entry in log if entry[:2] == ("mark", "in")]
    first = log.index(("wait", "in", marks[0]))
    assert log.index(("mark", "in", marks[2])) < first < log.index(("mark", "in", marks[3]))


class Failing(CpuStreams):
    """Streams whose copies fail while `broken`."""

    broken = True

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.broken:
            raise RuntimeError("the bus is gone")
        return super().staging(shape, dtype)


def test_what_goes_wrong_in_a_copy_is_said_at_its_end():
    experts = random_layer().pack()
    streams = Failing()
    device = device_of(streams, experts, 2)
    memory = device.experts(experts)
    event = memory.copy_in(0, experts)
    for _ in range(2):
        with pytest.raises(CopyError, match="the bus is gone"):
            event.wait()
        with pytest.raises(CopyError, match="the bus is gone"):
            event.done()
    memory.release(0)
    assert device.used_bytes == 0
    streams.broken = False
    memory.copy_in(0, experts).wait()
    streams.broken = True
    with pytest.raises(CopyError, match="the bus is gone"):
        memory.copy_out(0, experts).wait()


def test_a_budget_is_kept_and_given_back():
    experts = random_layer().pack()
    size = experts.native.expert_nbytes
    device = CudaDevice(2 * size + 1, CpuStreams())
    memory = device.experts(experts)
    memory.copy_in(0, experts)
    memory.copy_in(3, experts)
    assert device.used_bytes == 2 * size
    with pytest.raises(DeviceMemoryError, match=f"an expert of {size} bytes does not fit: all 2 places"):
        memory.copy_in(1, experts)
    memory.release(3)
    assert device.used_bytes == size
    memory.copy_in(1, experts)
    with pytest.raises(ValueError, match="memory is -1 bytes"):
        CudaDevice(-1, CpuStreams())


def test_pools_never_take_more_than_the_budget():
    one, two = random_layer().pack(), random_layer(weight_format="bf16").pack()
    sizes = [e.native.expert_nbytes for e in (one, two)]
    device = CudaDevice(4 * sizes[0], CpuStreams())
    device.set_aside([one], 3 * sizes[0])
    held = device.experts(one)
    held.copy_in(0, one).wait()
    other = device.experts(two)  # what is left is for one expert of the other layer's twice
    for expert in range(2):
        other.copy_in(expert, two)
    with pytest.raises(DeviceMemoryError, match="all 2 places"):
        other.copy_in(2, two)
    held.release(0)
    del other
    device.set_aside([two], 4 * sizes[0])  # the first pool has made room
    again = device.experts(two)
    for expert in range(EXPERTS):
        again.copy_in(expert, two).wait()
    assert device.used_bytes == EXPERTS * sizes[1]


def test_layouts_that_differ_have_shares():
    one, two = random_layer().pack(), random_layer(weight_format="bf16").pack()
    sizes = [e.native.expert_nbytes for e in (one, two)]
    device = CudaDevice(1 << 30, CpuStreams())
    device.set_aside([one, two], 3 * sizes[0])
    for experts, places in ((one, 2), (two, 2)):  # 3 of 7.5 in all
        memory = device.experts(experts)
        for expert in range(places):
            memory.copy_in(expert, experts)
        with pytest.raises(DeviceMemoryError, match=f"all {places} places"):
            memory.copy_in(places, experts)


def test_less_memory_than_was_thought_means_fewer_places(monkeypatch, caplog):
    experts = random_layer().pack()
    make, asked = ExpertLayout.memory, []

    def scarce(layout: ExpertLayout, slots: int, device: torch.device) -> Any:
        asked.append(slots)
        if slots > 2:
            raise torch.OutOfMemoryError("no")
        return make(layout, slots, device)

    monkeypatch.setattr(ExpertLayout, "memory", scarce)
    with caplog.at_level(logging.WARNING, "ktcompile"):
        memory = device_of(CpuStreams(), experts, 5).experts(experts)
    assert asked == [5, 4, 3, 2] and "has no memory for 5 experts" in caplog.text
    for expert in range(2):
        memory.copy_in(expert, experts).wait()
    with pytest.raises(DeviceMemoryError, match="all 2 places"):
        memory.copy_in(2, experts)


def test_a_model_that_does_not_fit_after_all_is_placed_in_part(monkeypatch, caplog):
    packed = [random_layer(seed=seed).pack() for seed in range(2)]
    make = ExpertLayout.memory

    def scarce(layout: ExpertLayout, slots: int, device: torch.device) -> Any:
        if slots > 3:
            raise torch.OutOfMemoryError("no")
        return make(layout, slots, device)

    monkeypatch.setattr(ExpertLayout, "memory", scarce)
    device = device_of(CpuStreams(), packed[0], 2 * EXPERTS)
    with caplog.at_level(logging.WARNING, "ktcompile"):
        Placer(device, 1.0, stream_from=0, hardware=preset("laptop")).place(packed, [2, 2])
    assert [len(experts.split.resident) for experts in packed] == [3, 0]
    assert "experts stay with the CPU, expert 3 first" in caplog.text


def test_formats_without_kernels_are_refused():
    experts = random_layer(weight_format="int8_dyn").pack()
    with pytest.raises(ValueError, match="int8_dyn, which has no GPU kernel"):
        device_of(CpuStreams(), experts, 1).experts(experts)


@pytest.mark.parametrize(
    ("cuda", "gpus", "triton", "why"),
    [
        (None, 0, True, "is built without CUDA; install a build of torch for CUDA"),
        ("13.0", 0, True, "torch finds no GPU; check"),
        ("13.0", 1, False, r"Triton is not installed; install it with: pip install 'ktcompile\[gpu\]'"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_said_why(cuda, gpus, triton, why, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(cuda_support.importlib.util, "find_spec", lambda name: SimpleNamespace() if triton else None)
    with pytest.raises(ValueError, match=f"device 'cuda' cannot be used: .*{why}"):
        device_for("cuda", 1 << 20)


def test_a_budget_of_what_is_free_leaves_a_reserve():
    gib = 1 << 30
    assert cuda_support.budget(20 * gib, 24 * gib) == 20 * gib - int(24 * gib * 0.1)
    assert cuda_support.budget(5 * gib, 8 * gib) == 4 * gib
    assert cuda_support.budget(gib // 2, 8 * gib) == 0
