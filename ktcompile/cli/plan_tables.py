"""The tables of `ktc plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from ktcompile.cli.sizes import human

if TYPE_CHECKING:
    from ktcompile.cli.plan import Answer
    from ktcompile.plan.architecture import Architecture
    from ktcompile.plan.estimate import Prediction, Tier
    from ktcompile.plan.hardware import Hardware


def print_answer(found: Answer) -> None:
    """Print what was found: the verdict last, where a terminal ends."""
    console = Console(highlight=False, markup=False)
    console.print(_model_table(found))
    console.print(_memory_table(found))
    console.print(_room(found), soft_wrap=True)
    if found.estimate.predictions:
        console.print(_speed_table(found))
    console.print(_format_table(found))
    for title, lines in (("assumed", found.assumptions), ("note", found.notes), ("warning", found.warnings)):
        for line in lines:
            console.print(f"{title}: {line}", soft_wrap=True)
    console.print("it fits" if found.estimate.fits else "it does not fit")
    if found.command is not None:
        console.print(f"run it: {found.command}", soft_wrap=True)


def _model_table(found: Answer) -> Table:
    model = found.model
    parts = {
        "model": f"{model.name} ({model.model_type})",
        "parameters": f"{model.parameters / 1e9:,.2f} billion, {model.active_parameters / 1e9:,.2f} of each token",
        "layers": f"{model.num_layers}, {len(model.experts)} with experts",
        "experts": _experts(model),
        "cache": f"{model.kv_bytes_per_token:,} bytes per token{_windows(model)}",
        "checkpoint": f"{human(model.stored_bytes)}, experts in {model.stored_format}",
        "weight format": f"{found.weight_format}: {human(found.expert_bytes)} of experts",
        "hardware": _hardware(found.hardware),
        "workload": f"{found.workload.batch} x {found.workload.context:,} tokens",
    }
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in parts.items():
        table.add_row(name, value)
    return table


def _experts(model: Architecture) -> str:
    if not model.experts:
        return "none"
    sizes = dict.fromkeys(
        f"{e.num_experts} of {e.hidden_size} x {e.intermediate_size}, {e.top_k} for a token" for e in model.experts
    )
    return "; ".join(sizes)


def _windows(model: Architecture) -> str:
    windows = sorted({c.window for c in model.cache if c.window is not None})
    states = sum(c.state_bytes for c in model.cache)
    text = f", {sum(c.window is not None for c in model.cache)} layers keep {windows[0]:,}" if windows else ""
    return text + (f", {human(states)} of states" if states else "")


def _hardware(hardware: Hardware) -> str:
    parts = [hardware.cpu, *([hardware.device] if hardware.device else [])]
    texts = [f"{p.name} ({p.bandwidth / 1e9:,.0f} GB/s, {p.flops / 1e12:,.2f} TFLOP/s)" for p in parts]
    if hardware.link is not None:
        texts.append(f"link {hardware.link.bandwidth / 1e9:,.0f} GB/s")
    return "; ".join(texts)


def _memory_table(found: Answer) -> Table:
    result = found.estimate
    unit, scale = ("GB", 1e9) if found.model.parameters > 1e9 else ("MB", 1e6)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in (unit, "dense", "experts", "cache", "buffers", "reserve", "all", "there is", "left"):
        table.add_column(name, justify="left" if name == unit else "right", no_wrap=True)
    tiers: dict[str, Tier | None] = {"device": result.device, "RAM": result.ram, "disk": result.disk}
    for name, tier in tiers.items():
        if tier is not None:
            parts = (tier.dense, tier.experts, tier.cache, tier.workspace, tier.reserve, tier.used)
            numbers = [_short(part / scale) if part else "-" for part in parts]
            limits = ("?" if value is None else _short(value / scale) for value in (tier.capacity, tier.free))
            table.add_row(name, *numbers, *limits)
    return table


def _short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _room(found: Answer) -> str:
    result = found.estimate
    tokens = "any number of" if result.cache_tokens is None else f"{result.cache_tokens:,}"
    share = f"{found.share:.0%} of experts on the device; " if found.model.experts and result.device else ""
    return f"  {share}room for {tokens} tokens of each sequence; {human(result.load_peak)} of RAM while loading"


def _speed_table(found: Answer) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("predicted", "tokens/s", "step, ms", "dense", "CPU", "device", "copies"):
        table.add_column(name, justify="left" if name == "predicted" else "right", no_wrap=True)
    for p in found.estimate.predictions:
        times = (p.seconds, p.dense_seconds, p.cpu_seconds, p.device_seconds, p.copy_seconds)
        numbers = (_short(seconds * 1000) if seconds else "-" for seconds in times)
        table.add_row(_step(p), f"{p.tokens_per_second:,.1f}", *numbers)
    return table


def _step(prediction: Prediction) -> str:
    if prediction.kind == "decode":
        return f"decode, batch {prediction.tokens:,}"
    return f"prefill, {prediction.tokens:,} tokens"


def _format_table(found: Answer) -> Table:
    table = Table("if packed as", box=box.SIMPLE)
    for name in ("experts", "decode tokens/s", "fits"):
        table.add_column(name, justify="right")
    for choice in found.formats:
        rate = choice.decode_tokens_per_second
        fits = "yes" if choice.fits else "when loaded" if rate is not None else "no"
        table.add_row(choice.weight_format, human(choice.expert_bytes), "-" if rate is None else f"{rate:,.1f}", fits)
    return table
