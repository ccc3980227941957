"""The device without a GPU: its budget, its clock and its failures."""

from __future__ import annotations

import pytest
import torch
from helpers.compare import assert_reduction
from helpers.layers import EXPERTS, random_inputs, random_layer

from ktcompile.ops import moe
from ktcompile.plan.hardware import Link
from ktcompile.runtime.device import CopyError, DeviceMemoryError
from ktcompile.runtime.stand_in import StandInDevice, StandInExperts, VirtualClock

SLOW = Link(bandwidth=1e6, latency=0.5)


def run(held: StandInExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the device's products of all experts, those that it does not hold among them."""
    products = held.begin(x, ids, weights)
    products.add(held.select(range(EXPERTS)))
    return products.result()


def test_a_budget_is_kept_and_given_back():
    experts = random_layer().pack()
    size = experts.native.expert_nbytes
    device = StandInDevice(2 * size, SLOW, VirtualClock())
    held = device.experts(experts)
    assert device.used_bytes == 0
    held.copy_in(0, experts)
    held.copy_in(3, experts)
    assert device.used_bytes == 2 * size
    with pytest.raises(
        DeviceMemoryError, match=rf"an expert of {size} bytes does not fit: .* {2 * size} of them in use"
    ):
        held.copy_in(1, experts)
    held.release(3)
    assert device.used_bytes == size
    held.copy_in(1, experts)


def test_what_a_copy_has_not_brought_is_no_number():
    experts = random_layer().pack()
    device = StandInDevice(1 << 30, SLOW, VirtualClock())
    held = device.experts(experts)
    x, ids, weights = random_inputs(3, top_k=1)
    fourth = torch.full_like(ids, 4)
    event = held.copy_in(4, experts)
    assert not event.done()
    assert run(held, x, fourth, weights).isnan().all()
    device.clock.advance(SLOW.seconds(experts.native.expert_nbytes))
    assert event.done()
    assert torch.equal(run(held, x, fourth, weights), moe(x, fourth, weights, experts))
    held.release(4)
    assert run(held, x, fourth, weights).isnan().all()
    assert not run(held, x, torch.full_like(ids, EXPERTS), weights).any()  # skipped


def test_selections_are_summed():
    experts = random_layer().pack()
    device = StandInDevice(1 << 30, SLOW, VirtualClock())
    held = device.experts(experts)
    for expert in range(EXPERTS):
        held.copy_in(expert, experts).wait()
    x, ids, weights = random_inputs(9)
    products = held.begin(x, ids, weights)
    assert not products.result().any()
    for selection in ([0, 3], [1], [2, 4]):
        products.add(held.select(selection))
    assert_reduction(products.result(), moe(x, ids, weights, experts))


def test_copies_end_in_their_order_and_after_their_time():
    experts = random_layer().pack()
    device = StandInDevice(1 << 30, SLOW, VirtualClock())
    held = device.experts(experts)
    events = [held.copy_in(0, experts), held.copy_in(1, experts)]
    one = SLOW.seconds(experts.native.expert_nbytes)
    device.clock.advance(1.5 * one)
    assert [e.done() for e in events] == [True, False]
    events[1].wait()
    assert device.clock.now == pytest.approx(2 * one)


def test_copies_fail_when_told_to():
    experts = random_layer().pack()
    device = StandInDevice(1 << 30, SLOW, VirtualClock())
    held = device.experts(experts)
    with device.failing(iter(("", "the bus is gone"))):
        good, bad = held.copy_in(0, experts), held.copy_in(1, experts)
        good.wait()
        with pytest.raises(CopyError, match="the bus is gone"):
            bad.wait()


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="memory is -1 bytes"):
        StandInDevice(-1, SLOW, VirtualClock())
    with pytest.raises(ValueError, match="advance by -2"):
        VirtualClock().advance(-2)
