"""Experts follow what routers choose, and results do not notice."""

from __future__ import annotations

import torch
from helpers.compare import assert_reduction
from helpers.layers import EXPERTS, random_inputs, random_layer

from ktcompile.config import PLACEMENTS
from ktcompile.ops import PackedExperts, moe
from ktcompile.plan.hardware import Hardware, Link, Processor
from ktcompile.plan.placement import STRATEGIES
from ktcompile.plan.replan import ReplanConfig
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.split import SplitExperts
from ktcompile.runtime.stand_in import StandInDevice, VirtualClock

FAST = Link(bandwidth=1e12, latency=0.0)
# A device beside which the CPU is slow, so that experts this small are worth a copy.
MACHINE = Hardware(
    "slow CPU", Processor("cpu", 1 << 40, 1e6, 1e9, 0.0), Processor("device", 1 << 40, 1e12, 1e15, 0.0), FAST
)
EAGER = ReplanConfig(interval=4, horizon=100_000, link_share=1.0)
LAYERS = 3


class Model:
    """Layers on two sides, whose every token goes to the same few experts."""

    def __init__(self, fraction: float, config: ReplanConfig = EAGER) -> None:
        plain = [random_layer(seed=seed) for seed in range(LAYERS)]
        self.alone, self.layers = [layer.pack() for layer in plain], [layer.pack() for layer in plain]
        size = self.layers[0].native.expert_nbytes
        self.device = StandInDevice(LAYERS * EXPERTS * size, FAST, VirtualClock())
        self.placer = Placer(self.device, fraction, "adaptive", config=config, hardware=MACHINE)
        self.placer.place(self.layers, [1] * LAYERS)
        self.budget = fraction * LAYERS * EXPERTS * size

    def call(self, hot: list[int], tokens: int = 2) -> None:
        x, ids, weights = random_inputs(tokens, top_k=1)
        for layer, alone, expert in zip(self.layers, self.alone, hot, strict=True):
            chosen = torch.full_like(ids, expert)
            assert_reduction(moe(x, chosen, weights, layer), moe(x, chosen, weights, alone))
        self.placer.step(self.layers)
        self.device.clock.advance(1e-3)
        assert self.device.used_bytes <= self.budget

    def resident(self) -> list[frozenset[int]]:
        return [split_of(layer).resident for layer in self.layers]


def split_of(experts: PackedExperts) -> SplitExperts:
    layer = experts.split
    assert isinstance(layer, SplitExperts)
    return layer


def test_experts_that_are_used_come_to_the_device_and_go_when_others_are():
    model = Model(0.2)
    for hot, calls in (([4, 3, 2], 20), ([1, 4, 4], 80)):
        for _ in range(calls):
            model.call(hot)
        assert all(expert in resident for expert, resident in zip(hot, model.resident(), strict=True))


def test_a_prompt_is_planned_for_at_once():
    model = Model(0.2, ReplanConfig(interval=10_000, horizon=100_000, link_share=1.0))
    for _ in range(4):  # experts leave, then others come, then they are used
        model.call([4, 3, 2], tokens=40)
    assert all(expert in resident for expert, resident in zip([4, 3, 2], model.resident(), strict=True))


def test_nothing_moves_where_everything_or_nothing_fits():
    for fraction in (0.0, 1.0):
        model = Model(fraction)
        for _ in range(20):
            model.call([4, 3, 2])
        assert [len(r) for r in model.resident()] == [EXPERTS * fraction] * LAYERS


def test_small_savings_move_nothing():
    model = Model(0.2, ReplanConfig(interval=4, horizon=1))
    before = model.resident()
    for _ in range(20):
        model.call([4, 3, 2])
    assert model.resident() == before


def test_copies_that_fail_do_not_stop_it(caplog):
    model = Model(0.2)
    with model.device.failing(iter(["fault"] * 3)):
        for _ in range(80):
            model.call([4, 3, 2])
    assert "fault" in caplog.text
    assert all(expert in resident for expert, resident in zip([4, 3, 2], model.resident(), strict=True))


def test_a_layer_that_was_split_anew_is_no_longer_the_old_placers():
    model = Model(0.4)
    other = Placer(model.device, 0.2, "uniform")
    other.place(model.layers, [1] * LAYERS)
    before = model.resident()
    for _ in range(20):
        model.call([4, 3, 2])
    assert model.resident() == before


def test_options_name_the_strategies():
    assert set(PLACEMENTS) == set(STRATEGIES)
