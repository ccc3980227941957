"""Charts of simulated placement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ktcompile.plan.simulate import Result

_DPI = 150


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Draw tokens per second by the fraction on the device, a line for each strategy, and which experts of which layers
    were used on the device, into `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 4.8), layout="constrained", dpi=_DPI)
    speed, hits = figure.subplots(1, 2)
    for name in dict.fromkeys(r.strategy for r in results):
        own = sorted((r for r in results if r.strategy == name), key=lambda r: r.fraction)
        style = {"linestyle": ":", "color": "black"} if name == "clairvoyant" else {"marker": "o", "markersize": 3.5}
        speed.plot([100 * r.fraction for r in own], [r.tokens_per_second for r in own], label=name, **style)
    speed.set_xlabel("experts on the device, %")
    speed.set_ylabel("simulated tokens generated per second")
    speed.grid(alpha=0.3)
    speed.legend(fontsize=7.5)
    shown = _shown(results)
    if shown is not None:
        rate = np.divide(shown.hits, shown.uses, out=np.full(shown.uses.shape, np.nan), where=shown.uses > 0)
        # The most used experts of each layer first, since ids mean nothing.
        order = np.argsort(-shown.uses, axis=1, kind="stable")
        image = hits.imshow(np.take_along_axis(rate, order, axis=1), aspect="auto", vmin=0, vmax=1, cmap="viridis")
        figure.colorbar(image, ax=hits, label="share of an expert's tokens on the device")
        hits.set_title(f"{shown.strategy}, {100 * shown.fraction:.0f} % on the device", fontsize=10)
        hits.set_xlabel("experts, the most used first")
        hits.set_ylabel("layer")
    else:
        hits.remove()
    figure.suptitle(f"simulated: {title}", fontsize=10)
    figure.savefig(path)


def _shown(results: Sequence[Result]) -> Result | None:
    """Return the run whose hits are drawn: of the adaptive strategy if there is one, nearest to half on the device."""
    real = [r for r in results if r.hits.any()]
    named = [r for r in real if r.strategy == "adaptive"] or real
    return min(named, key=lambda r: abs(r.fraction - 0.5), default=None)
