"""The device "cuda" beside the CPU, in Triton's interpreter or on a GPU. `test_triton_kernels.py` runs this file."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction, relative_error
from helpers.layers import EXPERTS, HIDDEN, Layer, random_inputs, random_layer
from helpers.moe_models import build, case_of
from helpers.triton_device import DEVICE
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktcompile.ops import PackedExperts, moe
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.quant import FORMATS
from ktcompile.runtime import cuda_measure, devices
from ktcompile.runtime.call import SplitCall
from ktcompile.runtime.cuda import CudaDevice
from ktcompile.runtime.cuda_streams import CudaStreams
from ktcompile.runtime.device import DeviceMemoryError
from ktcompile.runtime.devices import Placer, facts_of
from ktcompile.runtime.split import SplitExperts
from ktcompile.runtime.streaming import Streaming
from ktcompile.runtime.streams import CpuStreams, Stream, Streams

WITH_KERNELS = [name for name, f in FORMATS.items() if not f.dynamic]


def streams() -> Streams:
    return CpuStreams() if DEVICE.type == "cpu" else CudaStreams(torch.device("cuda", torch.cuda.current_device()))


def device_for(experts: PackedExperts, room: int) -> CudaDevice:
    return CudaDevice(room * experts.native.expert_nbytes, streams())


def split(experts: PackedExperts, room: int, **options: Any) -> tuple[SplitExperts, CudaDevice]:
    """Put a layer beside a device with room for so many experts."""
    device = device_for(experts, room)
    layer = SplitExperts(experts, device, **options)
    experts.split = layer
    return layer, device


def run(experts: PackedExperts, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return moe(*(t.to(DEVICE) for t in inputs), experts).cpu()


def assert_close(got: torch.Tensor, layer: Layer, inputs: tuple[torch.Tensor, ...]) -> None:
    """The right result in fp64, with the weights as they are stored. For some formats the CPU multiplies bf16 rows."""
    x = inputs[0]
    wanted = layer.reference(*inputs)
    exact = x.dtype == torch.float32 and layer.spec.weight_format in ("fp32", "fp16")
    if exact:
        assert_reduction(got, wanted)
    else:
        unit = torch.finfo(torch.bfloat16 if x.dtype == torch.float32 else x.dtype).eps
        assert relative_error(got, wanted) <= 2 * unit


def place(layer: SplitExperts, count: int) -> None:
    for expert in range(EXPERTS - count, EXPERTS):
        layer.promote(expert)
    layer.settle()
    assert len(layer.resident) == count


@pytest.mark.parametrize("weight_format", WITH_KERNELS)
def test_any_number_of_resident_experts(weight_format: str) -> None:
    layer = random_layer(weight_format=weight_format, bias=True)
    experts = layer.pack()
    both, device = split(experts, EXPERTS)
    inputs = random_inputs(2)
    inputs[1][0, 1] = EXPERTS + 3  # another machine's
    alone = run(experts, inputs)
    for count in (2, EXPERTS):
        for expert in range(count):
            if expert not in both.resident:
                both.promote(expert)
        both.settle()
        assert len(both.resident) == count and device.used_bytes == count * experts.native.expert_nbytes
        got = run(experts, inputs)
        assert_close(got, layer, inputs)
    assert both.cpu_bytes == 0
    before = raw(random_layer(weight_format=weight_format, bias=True).pack())
    both.dissolve()
    assert device.used_bytes == 0
    assert torch.equal(raw(experts), before)  # bit for bit, after the way there and back
    assert_exact(moe(*inputs, experts), alone)  # it is the CPU's alone again


def raw(experts: PackedExperts) -> torch.Tensor:
    """Return the bytes of all experts."""
    size = sum(experts.native.parts)
    found = torch.empty(experts.num_experts, size, dtype=torch.uint8)
    for expert in range(experts.num_experts):
        experts.native.read(expert, found[expert].data_ptr())
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "fp16", "int4_g32"])
def test_inputs_of_every_dtype(weight_format: str, dtype: torch.dtype) -> None:
    layer = random_layer(weight_format=weight_format, bias=True)
    experts = layer.pack()
    both, _ = split(experts, EXPERTS)
    place(both, 3)
    got = run(experts, random_inputs(2, dtype))
    assert got.dtype == dtype
    assert_close(got, layer, random_inputs(2, dtype))


@pytest.mark.parametrize("weight_format", ["fp32", "int4_g32_zp"])
def test_streamed_experts_have_the_bits_of_resident_ones(weight_format: str) -> None:
    layer = random_layer(weight_format=weight_format, bias=True)
    one, two = layer.pack(), layer.pack()
    resident, _ = split(one, EXPERTS)
    place(resident, EXPERTS)
    streamed, device = split(two, 3, streaming=Streaming(from_tokens=1, experts=1))
    place(streamed, 1)
    assert_exact(run(two, random_inputs(4)), run(one, random_inputs(4)))
    assert streamed.activity.streamed_rows > 0 and streamed.activity.cpu_rows == 0
    assert device.used_bytes == two.native.expert_nbytes


def test_layers_that_are_alike_share_slots() -> None:
    layers = [random_layer(seed=seed) for seed in range(3)]
    packed = [layer.pack() for layer in layers]
    other = random_layer(weight_format="int4_g32")
    packed.append(other.pack())
    size = packed[0].native.expert_nbytes
    device = CudaDevice(100 * size, streams())
    device.set_aside(packed, 4 * size)
    both = [SplitExperts(experts, device) for experts in packed]
    for experts, layer in zip(packed, both, strict=True):
        experts.split = layer
    both[0].promote(0)
    both[2].promote(3)
    both[1].promote(1)
    with pytest.raises(DeviceMemoryError, match="places for such are taken"):
        both[1].promote(2)
    both[3].promote(4)
    for layer in both:
        layer.settle()
    for experts, layer in zip(packed, (*layers, other), strict=True):
        assert_close(run(experts, random_inputs(2)), layer, random_inputs(2))
    both[0].demote(0)
    both[0].settle()
    both[1].promote(2)  # in the slot that the first layer had
    both[1].settle()
    for experts, layer in zip(packed, (*layers, other), strict=True):
        assert_close(run(experts, random_inputs(2)), layer, random_inputs(2))


def test_a_layer_that_is_gone_leaves_its_slots() -> None:
    experts = random_layer().pack()
    both, device = split(experts, 2)
    place(both, 2)
    del both, experts
    deadline = time.monotonic() + 10
    while device.used_bytes and time.monotonic() < deadline:  # the copying thread lets go a moment after it has told
        gc.collect()
        time.sleep(0.01)
    assert device.used_bytes == 0


def test_a_model_is_placed_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CALLS", "_ROWS"):
        monkeypatch.setattr(cuda_measure, name, 2)  # else it takes a minute in the interpreter
    layer = random_layer()
    experts = layer.pack()
    device = device_for(experts, 4)
    Placer(device, 0.6, stream_from=0).place([experts], [2])
    assert device.used_bytes == 3 * experts.native.expert_nbytes
    assert_close(run(experts, random_inputs(2)), layer, random_inputs(2))
    measured, link = device_for(experts, 3).hardware(experts, replace(facts(experts), top_k=2))
    assert measured.memory_bytes == 3 * experts.native.expert_nbytes
    assert min(measured.bandwidth, measured.flops, measured.overhead, link.bandwidth) > 0
    nothing, _ = device_for(experts, 0).hardware(experts, facts(experts))
    assert nothing.bandwidth > 0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU test_cuda_models.py does it")
def test_a_compiled_model_runs_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(1 << 30, CpuStreams())
    monkeypatch.setattr(devices, "cuda_device", lambda memory_bytes: device)
    for name in ("_CALLS", "_ROWS"):
        monkeypatch.setattr(cuda_measure, name, 2)
    devices.device_for.cache_clear()
    model, kwargs = build(case_of("qwen3_moe"))
    options = {"inner": "eager", "device": "cuda", "placement": "uniform", "stream_from": 0}
    with torch.no_grad():
        wanted = model(**kwargs).logits
        got = torch.compile(model, backend="kt", options=options)(**kwargs).logits
    devices.device_for.cache_clear()
    assert device.used_bytes > 0
    assert relative_error(got, wanted) < 1e-5


def facts(experts: PackedExperts) -> MoeLayerFacts:
    return facts_of([experts], [3]).layers[0]


def test_spans_are_known_once_the_products_are_there() -> None:
    experts = random_layer().pack()
    both, _ = split(experts, 2)
    place(both, 2)
    products = both.memory.begin(*(t.to(DEVICE) for t in random_inputs(2)))
    assert products.span() is None
    products.add(both.memory.select([3, 4]))
    before = time.perf_counter()
    products.result().cpu()
    began, ended = products.span()
    assert began < ended and before - 60 < ended <= time.perf_counter()


def faulty_streams() -> tuple[Streams, FaultyStream]:
    """Return streams whose copies of experts may fail, and the one that says when."""
    through = streams()
    through.copy_in = through.copy_out = faulty = FaultyStream(through.copy_in)
    return through, faulty


class FaultyStream:
    """A stream that cannot be used as often as `faults` says."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.faults = stream, 0
        self.after, self.keep, self.mark = stream.after, stream.keep, stream.mark

    def run(self) -> AbstractContextManager[None]:
        if self.faults:
            self.faults -= 1
            raise RuntimeError("fault")
        return self._stream.run()


def test_experts_that_fail_to_arrive_are_the_cpus(caplog: pytest.LogCaptureFixture) -> None:
    layer = random_layer()
    experts = layer.pack()
    through, faulty = faulty_streams()
    device = CudaDevice(2 * experts.native.expert_nbytes, through)
    experts.split = both = SplitExperts(experts, device, streaming=Streaming(from_tokens=1, experts=1))
    faulty.faults = 2
    with caplog.at_level("WARNING", "ktcompile"):
        got = run(experts, random_inputs(7))
    assert_close(got, layer, random_inputs(7))
    assert caplog.text.count("is computed by the CPU: fault") == 2 and device.used_bytes == 0
    assert both.activity.bytes_streamed == (EXPERTS - 2) * experts.native.expert_nbytes


LAYERS: dict[str, tuple[Layer, PackedExperts]] = {}


class Moves(RuleBasedStateMachine):
    """Experts move while calls begin and end between: every result is right, and every expert somewhere."""

    @initialize(
        weight_format=st.sampled_from(("fp32", "int4_g32_zp", "mxfp4")),
        room=st.integers(0, EXPERTS),
        keep=st.booleans(),
        streaming=st.none() | st.builds(Streaming, st.sampled_from((1, 7)), st.integers(1, 3)),
    )
    def start(self, weight_format: str, room: int, keep: bool, streaming: Streaming | None) -> None:
        if weight_format not in LAYERS:
            layer = random_layer(weight_format=weight_format, bias=True)
            LAYERS[weight_format] = layer, layer.pack()
        self.source, plain = LAYERS[weight_format]
        self.bytes, self.experts = raw(plain), self.source.pack()
        through, self.faulty = faulty_streams()
        self.device = CudaDevice(room * self.experts.native.expert_nbytes, through)
        self.layer = SplitExperts(self.experts, self.device, keep_cpu_copy=keep, streaming=streaming)
        self.experts.split = self.layer
        self.under_way: list[tuple[SplitCall, tuple[torch.Tensor, ...]]] = []

    @rule(expert=st.integers(0, EXPERTS - 1))
    def promote(self, expert: int) -> None:
        if expert in self.layer.resident | self.layer.moving:
            return
        room = self.device.used_bytes + self.experts.native.expert_nbytes <= self.device.memory_bytes
        with nullcontext() if room else pytest.raises(DeviceMemoryError):
            self.layer.promote(expert)

    @rule(expert=st.integers(0, EXPERTS - 1))
    def demote(self, expert: int) -> None:
        if expert in self.layer.resident - self.layer.moving:
            self.layer.demote(expert)

    @rule(faults=st.integers(0, 2))
    def fail(self, faults: int) -> None:
        """Let some of the next copies fail."""
        self.faulty.faults = faults

    @rule()
    def poll(self) -> None:
        self.layer.poll()

    @rule(tokens=st.sampled_from((1, 7)), seed=st.integers(0, 3))
    def begin(self, tokens: int, seed: int) -> None:
        inputs = random_inputs(tokens, seed=seed)
        self.under_way.append((self.layer.submit(*(t.to(DEVICE) for t in inputs)), inputs))

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 9))
    def finish(self, which: int) -> None:
        call, inputs = self.under_way.pop(which % len(self.under_way))
        part = call.resident(inputs[0].to(DEVICE), inputs[2].to(DEVICE))
        assert_close(call.finish(part).cpu(), self.source, inputs)

    @invariant()
    def every_expert_is_somewhere(self) -> None:
        layer, size = self.layer, self.experts.native.expert_nbytes
        held = len(layer.resident | set(layer._entering))
        assert self.device.used_bytes == held * size <= self.device.memory_bytes

    def teardown(self) -> None:
        for call, _ in getattr(self, "under_way", ()):
            call.finish(torch.zeros(1, HIDDEN, device=DEVICE))
        if hasattr(self, "layer"):
            self.layer.settle()  # copies that were begun may still fail
            self.faulty.faults = 0
            self.layer.dissolve()
            assert torch.equal(raw(self.experts), self.bytes)


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@pytest.fixture(autouse=True)
def no_layer_left() -> Iterator[None]:
    yield
    gc.collect()
