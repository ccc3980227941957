"""A layer on two sides computes what it computes on one, whatever moves meanwhile."""

from __future__ import annotations

import gc
import logging
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction
from helpers.layers import DTYPES, EXPERTS, HIDDEN, Layer, random_inputs, random_layer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktcompile.ops import PackedExperts, moe
from ktcompile.plan.hardware import Link
from ktcompile.quant import FORMATS
from ktcompile.runtime.call import SplitCall
from ktcompile.runtime.device import DeviceMemoryError
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.split import SplitExperts
from ktcompile.runtime.stand_in import StandInDevice, VirtualClock
from ktcompile.runtime.streaming import Streaming

LINK = Link(bandwidth=1e9, latency=1e-3)
BATCHES = (1, 7, 40)


def split(experts: PackedExperts, room: int, **options: Any) -> tuple[SplitExperts, StandInDevice]:
    """Put a layer beside a device with room for so many experts."""
    device = StandInDevice(room * experts.native.expert_nbytes, LINK, VirtualClock())
    layer = SplitExperts(experts, device, **options)
    experts.split = layer
    return layer, device


def resident(layer: SplitExperts, count: int) -> None:
    for expert in range(EXPERTS - count, EXPERTS):
        layer.promote(expert)
    layer.settle()
    assert len(layer.resident) == count


@pytest.mark.parametrize("count", [0, 1, EXPERTS // 2, EXPERTS - 1, EXPERTS])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_any_number_of_resident_experts(weight_format, count):
    layer = random_layer(weight_format=weight_format, bias=True)
    plain, experts = layer.pack(), layer.pack()
    both, _ = split(experts, count)
    resident(both, count)
    for dtype in DTYPES:
        for tokens in (0, *BATCHES):
            inputs = random_inputs(tokens, dtype)
            got, wanted = moe(*inputs, experts), moe(*inputs, plain)
            if count in (0, EXPERTS):
                assert_exact(got, wanted, f"{dtype}, {tokens} tokens")
            else:
                assert_parts(got, wanted)


def assert_parts(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Both parts are rounded, and their sum."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    if not len(got):
        return
    if got.dtype == torch.float32:
        assert_reduction(got, wanted)
    else:
        unit = torch.finfo(got.dtype).eps
        assert float((got.double() - wanted.double()).norm() / wanted.double().norm()) <= 2 * unit


def test_ids_of_other_machines_are_skipped_and_negative_ones_refused():
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    both, _ = split(experts, 2)
    resident(both, 2)
    x, ids, weights = random_inputs(9)
    ids[::2, 1] = EXPERTS + 3
    assert_parts(moe(x, ids, weights, experts), moe(x, ids, weights, plain))
    ids[3, 0] = -2
    with pytest.raises(ValueError, match="topk_ids has -2"):
        moe(x, ids, weights, experts)
    assert_parts(moe(*random_inputs(9), experts), moe(*random_inputs(9), plain))  # and nothing hangs on


def test_an_expert_is_on_one_side_unless_a_copy_is_kept():
    one, two = random_layer().pack(), random_layer().pack()
    size = one.native.expert_nbytes
    moved, _ = split(one, 2)
    kept, _ = split(two, 2, keep_cpu_copy=True)
    resident(moved, 2)
    resident(kept, 2)
    assert (moved.cpu_bytes, kept.cpu_bytes) == ((EXPERTS - 2) * size, EXPERTS * size)


def test_weights_that_are_asked_for_come_back():
    layer = random_layer(weight_format="int4_g32")
    plain, experts = layer.pack(), layer.pack()
    both, _ = split(experts, 3)
    resident(both, 3)
    for got, wanted in zip(experts.unpack(EXPERTS - 1), plain.unpack(EXPERTS - 1), strict=True):
        assert torch.equal(got, wanted)
    gate_up, down = torch.empty_like(layer.gate_up), torch.empty_like(layer.down)
    experts.unpack_into(gate_up, down)
    assert torch.equal(gate_up, layer.stored(layer.gate_up)) and torch.equal(down, layer.stored(layer.down))


def test_a_dissolved_layer_is_the_cpus_again():
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    both, device = split(experts, 3)
    resident(both, 3)
    both.dissolve()
    assert device.used_bytes == 0
    inputs = random_inputs(9)
    assert_exact(moe(*inputs, experts), moe(*inputs, plain))


def test_a_layer_that_is_gone_leaves_nothing_on_the_device():
    experts = random_layer().pack()
    both, device = split(experts, 3)
    resident(both, 3)
    gone = weakref.ref(experts)
    del both, experts
    gc.collect()
    assert gone() is None and device.used_bytes == 0


@pytest.mark.parametrize("budget", [0, 0.5, 2.5])
def test_a_budget_that_is_too_small_is_said_and_served(budget, caplog):
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    device = StandInDevice(int(budget * experts.native.expert_nbytes), LINK, VirtualClock())
    with caplog.at_level(logging.WARNING, "ktcompile"):
        Placer(device, 0.6).place([experts], [3])
    assert "stay with the CPU" in caplog.text
    assert device.used_bytes == int(budget) * experts.native.expert_nbytes
    assert_parts(moe(*random_inputs(9), experts), moe(*random_inputs(9), plain))


def test_moves_that_cannot_be_are_refused():
    both, _ = split(random_layer().pack(), 1)
    both.promote(0)
    for expert, why in ((0, "on its way there"), (EXPERTS, "none of the layer's 5")):
        with pytest.raises(ValueError, match=why):
            both.promote(expert)
    with pytest.raises(DeviceMemoryError, match="does not fit"):
        both.promote(1)
    with pytest.raises(ValueError, match="not on the device"):
        both.demote(1)
    both.settle()
    both.demote(0)
    with pytest.raises(ValueError, match="is leaving it"):
        both.demote(0)


def test_a_device_that_fails_does_not_hold_up_what_follows(monkeypatch):
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    both, _ = split(experts, 2)
    resident(both, 2)
    x, ids, weights = random_inputs(9)
    ticket = torch.ops.kt.moe_submit(x, ids, weights, experts.handle)
    with monkeypatch.context() as patch:
        patch.setattr(both.memory, "begin", lambda *_: (_ for _ in ()).throw(RuntimeError("no power")))
        with pytest.raises(RuntimeError, match="no power"):
            torch.ops.kt.moe_resident(x, weights, ticket)
    both.demote(EXPERTS - 1)
    both.settle()  # nothing is under way
    assert_parts(moe(x, ids, weights, experts), moe(x, ids, weights, plain))


def test_a_call_that_never_ended_is_over_with_the_next_one():
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    both, _ = split(experts, 2)
    resident(both, 2)
    x, ids, weights = random_inputs(9)
    torch.ops.kt.moe_submit(x, ids, weights, experts.handle)
    ticket = torch.ops.kt.moe_submit(x, ids, weights, experts.handle)
    part = torch.ops.kt.moe_resident(x, weights, ticket)
    assert_parts(torch.ops.kt.moe_wait(x, part, ticket), moe(x, ids, weights, plain))
    both.demote(EXPERTS - 1)
    both.settle()
    assert len(both.resident) == 1


@pytest.mark.parametrize("outward", [False, True])
def test_a_copy_that_fails_leaves_its_expert_where_it_was(outward, caplog):
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    both, device = split(experts, 2)
    if outward:
        resident(both, 2)
    before = both.resident
    with device.failing(iter(["unplugged"])), caplog.at_level(logging.WARNING, "ktcompile"):
        both.demote(EXPERTS - 1) if outward else both.promote(3)
        both.settle()
    assert both.resident == before and not both.moving
    assert "unplugged" in caplog.text and ("stays on the device" if outward else "stays with the CPU") in caplog.text
    assert_parts(moe(*random_inputs(9), experts), moe(*random_inputs(9), plain))
    both.demote(EXPERTS - 1) if outward else both.promote(3)  # the next attempt may succeed
    both.settle()
    assert both.resident != before


@pytest.mark.parametrize("count", [0, 1, EXPERTS // 2, EXPERTS - 1, EXPERTS])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_streamed_experts_are_computed_on_the_device(weight_format, count):
    layer = random_layer(weight_format=weight_format, bias=True)
    plain, experts = layer.pack(), layer.pack()
    both, device = split(experts, EXPERTS + 2, streaming=Streaming(from_tokens=7, experts=1))
    resident(both, count)
    for dtype in DTYPES:
        for tokens in BATCHES:
            before = both.activity.streamed_rows
            inputs = random_inputs(tokens, dtype)
            assert_parts(moe(*inputs, experts), moe(*inputs, plain))
            cold = int((inputs[1] < EXPERTS - count).sum())
            assert both.activity.streamed_rows - before == (cold if tokens >= 7 else 0)
    assert device.used_bytes == count * experts.native.expert_nbytes
    assert both.activity.cpu_rows == sum(
        int((random_inputs(1, dtype)[1] < EXPERTS - count).sum()) for dtype in DTYPES
    )  # of the calls that were too short


@pytest.mark.parametrize("room", [0, 1, 2, 3])
@pytest.mark.parametrize("buffer", [1, 2, EXPERTS])
def test_what_does_not_fit_or_arrive_is_the_cpus(room, buffer, caplog):
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    both, device = split(experts, room, streaming=Streaming(from_tokens=1, experts=buffer))
    inputs = random_inputs(40)
    with device.failing(iter(["", "unplugged", ""])), caplog.at_level(logging.WARNING, "ktcompile"):
        assert_parts(moe(*inputs, experts), moe(*inputs, plain))
    assert ("is computed by the CPU: unplugged" in caplog.text) == (room > 0)
    assert device.used_bytes == 0
    arrived = both.activity.bytes_streamed // experts.native.expert_nbytes
    assert arrived == (EXPERTS - 1 if room else 0)


def test_buffers_are_filled_while_others_are_used():
    """With one buffer the copies would take turns with the products; with two they never stop."""
    experts = random_layer().pack()
    _, device = split(experts, 2, streaming=Streaming(from_tokens=1, experts=1))
    moe(*random_inputs(40), experts)
    assert device.clock.now == pytest.approx(EXPERTS * LINK.seconds(experts.native.expert_nbytes))


def test_an_expert_that_is_on_its_way_is_not_streamed():
    layer = random_layer()
    plain, experts = layer.pack(), layer.pack()
    both, _ = split(experts, 4, streaming=Streaming(from_tokens=1, experts=1))
    both.promote(0)
    x, ids, weights = random_inputs(40)
    call = both.submit(x, ids, weights)
    both.promote(1)  # after the call has seen it on the CPU's side
    assert_parts(call.finish(call.resident(x, weights)), moe(x, ids, weights, plain))
    assert both.activity.bytes_streamed == (EXPERTS - 2) * experts.native.expert_nbytes
    both.settle()
    assert both.resident == {0, 1}
    with both.lending([2]), pytest.raises(ValueError, match="on its way there"):
        both.promote(2)


LAYERS: dict[str, Layer] = {}


class Moves(RuleBasedStateMachine):
    """Experts move, copies are late or fail, calls begin and end between: every result is right."""

    @initialize(
        weight_format=st.sampled_from(("fp32", "bf16", "int8_dyn", "int4_g32_zp", "int4_g32_dyn", "mxfp4")),
        room=st.integers(0, EXPERTS),
        keep=st.booleans(),
        streaming=st.none() | st.builds(Streaming, st.sampled_from((1, 7, 40)), st.integers(1, 3)),
    )
    def start(self, weight_format, room, keep, streaming):
        layer = LAYERS.setdefault(weight_format, random_layer(weight_format=weight_format, bias=True))
        self.plain, self.experts = layer.pack(), layer.pack()
        self.layer, self.device = split(self.experts, room, keep_cpu_copy=keep, streaming=streaming)
        self.under_way: list[tuple[SplitCall, tuple[torch.Tensor, ...]]] = []

    @rule(expert=st.integers(0, EXPERTS - 1), fails=st.booleans())
    def promote(self, expert, fails):
        if expert in self.layer.resident | self.layer.moving:
            return
        room = self.device.used_bytes + self.experts.native.expert_nbytes <= self.device.memory_bytes
        with self.device.failing(iter(["fault"] * fails)), nullcontext() if room else pytest.raises(DeviceMemoryError):
            self.layer.promote(expert)

    @rule(expert=st.integers(0, EXPERTS - 1), fails=st.booleans())
    def demote(self, expert, fails):
        if expert in self.layer.resident - self.layer.moving:
            with self.device.failing(iter(["fault"] * fails)):
                self.layer.demote(expert)

    @rule(seconds=st.sampled_from((0.0, 1e-3, 0.1)), delay=st.sampled_from((0.0, 0.05)))
    def wait(self, seconds, delay):
        self.device.clock.advance(seconds)
        self.device.delay = delay

    @rule(tokens=st.sampled_from(BATCHES), seed=st.integers(0, 3))
    def begin(self, tokens, seed):
        inputs = random_inputs(tokens, seed=seed)
        self.under_way.append((self.layer.submit(*inputs), inputs))

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 9), fails=st.booleans())
    def finish(self, which, fails):
        call, inputs = self.under_way.pop(which % len(self.under_way))
        with self.device.failing(iter(["", "fault"] * fails)):
            part = call.resident(inputs[0], inputs[2])
        got = call.finish(part)
        assert_reduction(got, moe(*inputs, self.plain))

    @invariant()
    def every_expert_is_somewhere(self):
        layer, size = self.layer, self.experts.native.expert_nbytes
        assert layer._released <= layer.resident
        assert layer.cpu_bytes == (EXPERTS - len(layer._released)) * size
        held = len(layer.resident | set(layer._entering))
        assert self.device.used_bytes == held * size <= self.device.memory_bytes

    def teardown(self):
        for call, _ in getattr(self, "under_way", ()):
            call.finish(torch.zeros(1, HIDDEN))


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
