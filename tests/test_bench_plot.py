"""Charts: drawn at all, and labels that can be read."""

from __future__ import annotations

import itertools

import pytest
from helpers.kernels_reports import OURS, PEER, contender, report

from ktcompile.bench import plot

MANY = (
    OURS,
    contender("ktcompile-int8/scalar", weight_format="int8", bytes_per_weight=1),
    contender("ktcompile-int8/avx2", weight_format="int8", bytes_per_weight=1, isa="avx2"),
    PEER,
    contender("kt-kernel-int8", "kt-kernel", weight_format="int8", bytes_per_weight=1, arithmetic="int8/scalar"),
)


@pytest.mark.parametrize("draw", [plot.draw_fractions, plot.draw_rooflines])
@pytest.mark.parametrize("shapes", [["one"], ["one", "two", "three"]])
def test_a_panel_for_each_shape(draw, shapes, tmp_path):
    draw(report(*shapes, contenders=MANY), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_labels_cover_neither_each_other_nor_points():
    drawn = report(contenders=MANY, tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048))
    figure, ((axes, shape),) = plot._panels(drawn)
    for r in shape.results:
        axes.plot([r.flops / r.bytes], [r.flops_per_second / 1e9], marker="o", label=r.contender)
    axes.set_xscale("log")
    axes.set_yscale("log")
    figure.draw_without_rendering()
    plot._label_points(axes, shape)
    assert len(axes.texts) >= 11
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = axes.transData.transform([(r.flops / r.bytes, r.flops_per_second / 1e9) for r in shape.results])
    assert not any(box.count_contains(points) for box in boxes)


def test_contenders_can_be_told_apart():
    styles = plot._styles(report(contenders=MANY))
    looks = {(s["color"], s["marker"], s.get("linestyle")) for s in styles.values()}
    assert len(looks) == len(styles) == len(MANY)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'ktcompile\[plot\]'"):
        plot.check()
