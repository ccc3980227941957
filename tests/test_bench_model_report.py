"""What follows from the turns of whole models, as numbers, as JSON and as a chart."""

from __future__ import annotations

import json

import pytest
from helpers.model_reports import DECODE, OURS, PEER, PREFILL, THIRD, contender, report

from ktcompile.bench.model import plot
from ktcompile.bench.model.report import ModelReport, agreement


def test_results_are_medians_minima_and_ratios_within_rounds():
    ours, peer, *rest = report().results
    assert (ours.contender, ours.work, ours.rounds, ours.seconds, ours.min_seconds) == ("kt", DECODE, 3, 2.0, 0.5)
    # Rounds of 3 / 1, 4 / 2 and 4 / 4; of the medians it would be 4 / 2.
    assert ours.ratios == {"transformers": 2.0} and peer.ratios == {}
    assert ours.tokens_per_second == 4 / 2.0
    # 1e9 bytes at 1e9 per second and 1e9 operations at 2e9; of the best, at 2e9 both.
    assert ours.fraction == 1 / 2.0 and ours.of_best == 0.5 / 2.0
    assert [(r.contender, r.work) for r in rest] == [("kt", PREFILL), ("transformers", PREFILL)]


def test_ratios_are_of_rounds_that_both_have():
    third = contender("kt:int4")
    found = report(seconds=((OURS, (1.0, 2.0)), (PEER, (3.0,)), (THIRD, ()), (third, (2.0, 2.0)))).results
    assert found[0].ratios == {"transformers": 3.0, "kt:int4": 1.5}
    assert found[2].contender == "kt:int4" and found[2].ratios == {"kt": 0.75, "transformers": 1.5}
    assert "vllm" not in {r.contender for r in found}


def test_json_is_read_again():
    found = report(interrupted=True)
    record = json.loads(json.dumps(found.to_json()))
    assert ModelReport.from_json(record) == found
    assert record["schema"] == "ktc bench model 1"
    assert record["results"][0]["tokens_per_second"] == 2.0 and record["results"][0]["work"]["kind"] == "decode"


@pytest.mark.parametrize("record", [[], {}, {"schema": "ktc bench kernels 1"}, {"schema": "ktc bench model 1"}])
def test_what_is_no_report_is_refused(record):
    with pytest.raises(ValueError, match=r"not a result of|a part is missing"):
        ModelReport.from_json(record)


def test_agreement_is_of_the_same_prompts():
    chosen = {"a": {"decode 2 0": [1, 2], "decode 2 1": [3, 4]}, "b": {"decode 2 1": [3, 5]}, "c": {"other": [3]}}
    assert agreement(chosen, ["a", "b", "c"]) == {"b": 0.5}
    assert agreement(chosen, ["a"]) == agreement({}, ["a", "b"]) == {}


def test_a_chart_has_a_bar_for_each_result(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, real = [], axes.bar

    def bar(self, places, heights, *others, **style):
        drawn.append((style["label"], heights))
        return real(self, places, heights, *others, **style)

    monkeypatch.setattr(axes, "bar", bar)
    found = report(seconds=((OURS, (1.0,)), (PEER, (2.0,)), (THIRD, ())))
    plot.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    speeds = [drawn[i] for i in range(3)]
    assert speeds == [("kt", [4.0]), ("transformers", [2.0]), ("vllm", [])]
    assert len(drawn) == 12  # speeds and fractions, of both works
