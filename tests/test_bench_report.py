"""What follows from turns, and reports as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.kernels_reports import FLOAT, INT8, OURS, PEER, SHAPE, contender, report, turn

from ktcompile.bench.report import KernelsReport, call_bytes, summarise
from ktcompile.bench.roofline import Ceilings

BEST = Ceilings(2e9, {FLOAT: 4e9, INT8: 8e9})


def only(turns, contenders=(OURS, PEER), best=BEST):
    results = summarise(SHAPE, contenders, turns, best)
    assert len(results) == 1
    return results[0]


def test_a_turn_is_held_against_its_own_ceilings():
    least = call_bytes(SHAPE, OURS, 1, 2)
    # The machine halves its bandwidth in the second round, and the contender keeps up with it.
    turns = [turn(round=r, bandwidth=b, flops=1e12, seconds=least / b / 0.8) for r, b in enumerate((2e9, 1e9, 2e9))]
    result = only(turns)
    assert result.fraction == pytest.approx(0.8)
    assert result.seconds == pytest.approx(least / 2e9 / 0.8)
    assert result.of_best == pytest.approx(0.8)
    assert result.min_of_best == pytest.approx(0.8 / 0.9)
    slow = only(turns[1:2])
    assert (slow.fraction, slow.of_best) == (pytest.approx(0.8), pytest.approx(0.4))


def test_the_fraction_is_a_median_over_rounds():
    least = call_bytes(SHAPE, OURS, 1, 2)
    turns = [turn(round=r, flops=1e12, seconds=least / 1e9 / f) for r, f in enumerate((0.1, 0.7, 0.9))]
    assert only(turns).fraction == pytest.approx(0.7)


def test_arithmetic_bounds_where_bytes_do_not():
    flops = SHAPE.flops(512)
    result = only([turn(tokens=512, bandwidth=1e15, flops=1e9, seconds=flops / 1e9 / 0.6)])
    assert result.fraction == pytest.approx(0.6)
    assert result.flops_per_second == pytest.approx(0.6e9)
    integers = contender("ktcompile-int8_dyn/scalar", arithmetic=INT8)
    seconds = flops / 8e9 / 0.5
    result = only(
        [turn(integers, 512, flops=8e9, bandwidth=1e15, seconds=seconds)], (integers,), replace(BEST, bandwidth=1e15)
    )
    assert result.fraction == result.of_best == pytest.approx(0.5)


def test_bytes_are_those_of_the_experts_touched_and_of_the_rows():
    expert = 3 * 64 * 32 * 2
    assert call_bytes(SHAPE, OURS, 5, 3.5) == 3.5 * expert + 5 * 64 * 4
    quarter = contender("ktcompile-int4/scalar", bytes_per_weight=0.5)
    assert call_bytes(SHAPE, quarter, 0, 4) == expert
    result = only([turn(distinct=2), turn(round=1, distinct=3)])
    assert result.bytes == pytest.approx(2.5 * expert + 64 * 4)
    assert result.bytes_per_second == pytest.approx(result.bytes / result.seconds)


def test_ratios_are_paired_by_round():
    # Both are slower in the second round; the peer has no third.
    turns = [turn(seconds=1), turn(round=1, seconds=4), turn(round=2, seconds=1)]
    turns += [turn(PEER, seconds=3), turn(PEER, round=1, seconds=12)]
    ours, peer = summarise(SHAPE, (OURS, PEER), turns, BEST)
    assert ours.ratios == {"transformers-eager": pytest.approx(3)}
    assert (ours.rounds, peer.rounds, peer.ratios) == (3, 2, {})


def test_results_are_by_token_count_in_the_order_of_contenders():
    turns = [turn(PEER, 8), turn(PEER, 1), turn(OURS, 8)]
    found = [(r.tokens, r.contender) for r in summarise(SHAPE, (OURS, PEER), turns, BEST)]
    assert found == [(1, PEER.name), (8, OURS.name), (8, PEER.name)]
    assert only([turn(PEER, 8)], (PEER,)).ratios == {}


def test_json_round_trip():
    before = report("tiny", "odd-small", interrupted=True)
    record = json.loads(json.dumps(before.to_json()))
    after = KernelsReport.from_json(record)
    assert after == before
    assert [r["fraction"] for r in record["shapes"][1]["results"]] == [r.fraction for r in after.shapes[1].results]
    assert {"ratios", "bytes_per_second", "flops_per_second"} <= set(record["shapes"][0]["results"][0])


def test_a_report_without_any_turn_survives():
    nothing = report()
    nothing = replace(nothing, shapes=(replace(nothing.shapes[0], best=None, turns=(), contenders=()),))
    assert KernelsReport.from_json(json.loads(json.dumps(nothing.to_json()))) == nothing
    assert nothing.shapes[0].results == ()


@pytest.mark.parametrize("damage", [[], {}, {"schema": "other"}, 3])
def test_other_json_is_refused(damage):
    with pytest.raises(ValueError, match="not a result of 'ktc bench kernels"):
        KernelsReport.from_json(damage)


def test_damaged_json_is_refused():
    record = json.loads(json.dumps(report().to_json()))
    del record["shapes"][0]["turns"][0]["seconds"]
    with pytest.raises(ValueError, match="missing or unknown"):
        KernelsReport.from_json(record)
