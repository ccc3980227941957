"""What a process of contenders is given to compute, and the process itself."""

from __future__ import annotations

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from helpers.kernels_reports import SHAPE, contender

from ktcompile.bench.process import ContenderError, ContenderProcess
from ktcompile.bench.worker import Dimensions, Routing, make_checked_ids, make_inputs, make_source
from ktcompile.machine import machine

DIMENSIONS = Dimensions(64, 8, 64, 32)


def test_one_token_touches_every_expert_before_it_touches_one_again():
    routing = Routing(DIMENSIONS, 2, (0,))
    calls = [routing.deal(1) for _ in range(32)]
    assert [layer for layer, _, _ in calls] == [0, 1] * 16
    for layer in (0, 1):
        own = [ids for at, ids, _ in calls if at == layer]
        for round in (own[:8], own[8:]):
            assert sorted(np.concatenate(round).flatten().tolist()) == list(range(64))


@pytest.mark.parametrize("tokens", [1, 2, 5, 64])
def test_tokens_share_experts_as_in_uniform_routing(tokens):
    routing = Routing(DIMENSIONS, 1, (1,))
    distinct = []
    for _ in range(200):
        _, ids, touched = routing.deal(tokens)
        assert ids.shape == (tokens, 8) and ids.dtype == np.int64
        assert all(len(set(row)) == 8 for row in ids.tolist())
        assert touched == len(np.unique(ids))
        distinct.append(touched)
    expected = 64 * (1 - (1 - 8 / 64) ** tokens)
    assert np.mean(distinct) == pytest.approx(expected, rel=0.03)


def test_consecutive_calls_share_no_more_experts_than_they_must():
    routing = Routing(DIMENSIONS, 1, (2,))
    touched = [set(routing.deal(3)[1].flatten().tolist()) for _ in range(50)]
    for before, after in itertools.pairwise(touched):
        assert len(before & after) == max(0, len(before) + len(after) - 64)


def test_everyone_computes_the_same():
    for make in (lambda: Routing(DIMENSIONS, 3, (1, 7)).deal(7)[1], lambda: make_checked_ids(DIMENSIONS, 3).numpy()):
        np.testing.assert_array_equal(make(), make())
    for make in (lambda: make_source(DIMENSIONS), lambda: make_inputs(DIMENSIONS, 3)):
        for a, b in zip(make(), make(), strict=True):
            assert torch.equal(a, b)


def test_experts_differ_and_take_the_room_of_one():
    gate_up, down = make_source(DIMENSIONS)
    assert (gate_up.shape, down.shape) == ((64, 64, 64), (64, 64, 32))
    for experts in (gate_up, down):
        assert len({tuple(e.flatten()[:50].tolist()) for e in experts}) == 64
        assert experts.float().std() == pytest.approx(0.02, rel=0.05)
        assert experts.untyped_storage().nbytes() < 0.5 * 2 * experts.numel() + 2 * 64 * 1184


@pytest.fixture
def process():
    started = ContenderProcess()
    yield started
    started.close()


def ours(**others):
    isa = machine().isa
    return contender("ours", isa=isa, layers=2, **{"weight_format": "bf16", "variant": "bf16", **others})


def test_a_process_sets_up_computes_and_times(process):
    assert process.set_up([ours(), contender("other", isa=machine().isa, weight_format="int3")], SHAPE, 4).keys() == {
        "other"
    }
    rows = process.rows("ours", 3)
    assert torch.tensor(rows).shape == (3, 64) and torch.tensor(rows).abs().sum() > 0
    seconds, distinct = process.time("ours", 4, 0, 0.001)
    assert 3 <= len(seconds) == len(distinct) <= 40
    assert min(seconds) > 0 and all(2 <= d <= 8 for d in distinct)
    assert process.time("ours", 4, 0, 0.001)[1][:3] == process.time("ours", 4, 0, 0.001)[1][:3]
    with pytest.raises(ContenderError, match="other"):
        process.rows("other", 3)
    assert process.alive


def test_a_process_that_ends_says_why(process):
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(ContenderError, match="ended by SIGKILL"):
        process.set_up([ours()], SHAPE, 4)
    assert not process.alive
    with pytest.raises(ContenderError, match="has ended"):
        process.rows("ours", 3)
