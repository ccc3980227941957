"""The chart of a model's experts: which were chosen, which are on the device, and how often those were the same."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from ktcompile.runtime.metrics import ExpertMetrics

_DPI = 150


def draw(metrics: ExpertMetrics, title: str, file: BinaryIO) -> None:
    """Draw how often each expert of each layer was chosen, a mark on those that are on the device, and beside it the
    hit rate of each layer, into a file as PNG."""
    from matplotlib.figure import Figure

    layers = metrics.layers
    chosen = np.full((len(layers), max(layer.num_experts for layer in layers)), np.nan)
    for row, layer in zip(chosen, layers, strict=True):
        row[: layer.num_experts] = np.array(layer.chosen) / max(1, sum(layer.chosen))
    figure = Figure(figsize=(11, max(3.0, 1.6 + 0.18 * len(layers))), layout="constrained", dpi=_DPI)
    heat, rates = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    image = heat.imshow(chosen, aspect="auto", vmin=0, cmap="viridis")
    figure.colorbar(image, ax=heat, label="share of the layer's tokens")
    places = [(expert, index) for index, layer in enumerate(layers) for expert in layer.resident]
    if places:
        experts, rows = zip(*places, strict=True)
        heat.scatter(experts, rows, s=9, c="white", edgecolors="black", linewidths=0.5, label="on the device")
        figure.legend(loc="outside lower left", fontsize=8)
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    rates.barh(range(len(layers)), [layer.activity.hit_rate or 0.0 for layer in layers], color="tab:blue")
    rates.set_xlim(0, 1)
    rates.set_xlabel("hit rate")
    rates.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{title}: {metrics.summary()}", fontsize=9, wrap=True)
    figure.savefig(file, format="png")
