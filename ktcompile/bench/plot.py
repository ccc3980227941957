"""Charts of benchmark reports."""

from __future__ import annotations

from pathlib import Path

from ktcompile.bench.moe import MoeReport


def plot_moe(report: MoeReport, title: str, path: Path) -> None:
    """Draw the fraction of the roofline by token count, a line for each contender, into `path`.

    ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'ktcompile[plot]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(r.contender for r in report.results):
        rows = [r for r in report.results if r.contender == name]
        axes.plot([r.tokens for r in rows], [r.fraction for r in rows], marker="o", label=name)
    b, roof = report.benchmark, report.roofline
    axes.set_xscale("log", base=2)
    axes.set_xticks(b.tokens, [str(t) for t in b.tokens])
    axes.set_ylim(0, 1.05)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("tokens")
    axes.set_ylabel("fraction of the measured roofline")
    axes.set_title(
        f"{title}, {b.shape.num_experts} experts, {b.dtype}, {b.threads} threads: "
        f"{roof.bandwidth / 1e9:.1f} GB/s, {roof.flops / 1e9:.0f} GFLOP/s",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
