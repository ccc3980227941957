"""The device without a GPU: its budget, its clock and its failures."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import EXPERTS, random_inputs, random_layer

from ktcompile.ops import moe
from ktcompile.plan.hardware import Link
from ktcompile.runtime.device import CopyError, DeviceMemoryError
from ktcompile.runtime.stand_in import StandInDevice, VirtualClock

SLOW = Link(bandwidth=1e6, latency=0.5)


def test_a_budget_is_kept_and_given_back():
    experts = random_layer().pack()
    size = experts.native.expert_nbytes
    device = StandInDevice(3 * size, SLOW)
    first = device.expert_slots(experts, 2)
    assert device.used_bytes == 2 * size
    with pytest.raises(DeviceMemoryError, match=rf"2 experts of {size} bytes do not fit: .* {2 * size} of them in use"):
        device.expert_slots(experts, 2)
    first.free()
    assert device.used_bytes == 0
    device.expert_slots(experts, 3)


def test_what_a_copy_has_not_brought_is_no_number():
    experts = random_layer().pack()
    device = StandInDevice(1 << 30, SLOW)
    slots = device.expert_slots(experts, 2)
    x, _, weights = random_inputs(3, top_k=1)
    first = torch.zeros(3, 1, dtype=torch.int64)
    event = slots.copy_in(0, experts, 4)
    assert not event.done()
    assert slots.run(x, first, weights).isnan().all()
    device.clock.advance(SLOW.seconds(experts.native.expert_nbytes))
    assert event.done()
    assert torch.equal(slots.run(x, first, weights), moe(x, torch.full_like(first, 4), weights, experts))
    assert not slots.run(x, torch.full_like(first, slots.count), weights).any()  # a slot of `count` is skipped


def test_copies_end_in_their_order_and_after_their_time():
    experts = random_layer().pack()
    device = StandInDevice(1 << 30, SLOW)
    slots = device.expert_slots(experts, 2)
    events = [slots.copy_in(0, experts, 0), slots.copy_in(1, experts, 1)]
    one = SLOW.seconds(experts.native.expert_nbytes)
    device.clock.advance(1.5 * one)
    assert [e.done() for e in events] == [True, False]
    events[1].wait()
    assert device.clock.now == pytest.approx(2 * one)


def test_copies_fail_when_told_to():
    experts = random_layer().pack()
    device = StandInDevice(1 << 30, SLOW)
    slots = device.expert_slots(experts, 1)
    with device.failing(iter(("", "the bus is gone"))):
        good, bad = slots.copy_in(0, experts, 0), slots.copy_in(0, experts, 1)
        good.wait()
        with pytest.raises(CopyError, match="the bus is gone"):
            bad.wait()


@pytest.mark.parametrize("count", [0, EXPERTS])
def test_no_slot_and_all_slots(count):
    experts = random_layer().pack()
    slots = StandInDevice(1 << 30, SLOW).expert_slots(experts, count)
    x, ids, weights = random_inputs(2)
    assert not slots.run(x, torch.full_like(ids, count), weights).any()


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="memory is -1 bytes"):
        StandInDevice(-1, SLOW)
    with pytest.raises(ValueError, match="advance by -2"):
        VirtualClock().advance(-2)
