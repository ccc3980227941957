"""What to do where a model does not fit: the largest format, context and fraction that would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ktcompile.plan.estimate import Estimate, Plan, Workload, estimate
from ktcompile.plan.facts import ModelFacts

_GB = 10**9


def warnings(plan: Plan, found: Estimate, formats: Mapping[str, ModelFacts]) -> tuple[str, ...]:
    """Return what does not fit, by how much, and what would.

    formats: the model's facts in formats that it could be packed in instead.
    """
    return tuple(_warnings(plan, found, formats))


def _warnings(plan: Plan, found: Estimate, formats: Mapping[str, ModelFacts]) -> Iterator[str]:
    if not found.runs:
        tiers = (("the device", found.device), ("RAM", found.ram))
        parts = [f"{_gb(-(t.free or 0))} more of {name}" for name, t in tiers if t is not None and not t.fits]
        yield f"does not fit: it needs {' and '.join(parts)}; {_remedy(plan, formats)}"
    elif not found.loads:
        yield (
            f"loading takes {_gb(found.load_peak)} of RAM, more than there is: all experts are packed in "
            "RAM before a device gets its part. Use a smaller weight format, or more RAM (swap will do)"
        )
    if not found.disk.fits:
        yield f"the checkpoint has {_gb(found.disk.used)}, but the disk only {_gb(found.disk.capacity or 0)}"
    if found.runs and found.device is None and plan.hardware.device is not None:
        yield _unused_device(plan)


def _remedy(plan: Plan, formats: Mapping[str, ModelFacts]) -> str:
    ways = []
    if plan.fraction is not None:
        best = estimate(replace(plan, fraction=None))
        if best.runs:
            share = sum(best.resident) / max(1, sum(layer.num_experts for layer in plan.facts.layers))
            ways.append(f"a device-expert-fraction of {share:.2f} fits")
    smaller = sorted(
        (f for f in formats.items() if f[1].expert_bytes < plan.facts.expert_bytes), key=lambda f: -f[1].expert_bytes
    )
    fitting = next((name for name, facts in smaller if estimate(replace(plan, facts=facts)).runs), None)
    if fitting is not None:
        ways.append(f"{fitting} fits ({_gb(formats[fitting].expert_bytes)} of experts)")
    context = _longest_context(plan)
    if context:
        ways.append(f"a context of {context:,} fits")
    if ways:
        return "; ".join(ways)
    least = ""
    if smaller:
        name, facts = smaller[-1]
        least = f" (the smallest format, {name}, needs {_gb(estimate(replace(plan, facts=facts)).ram.used)} of RAM)"
    return f"no format and no context makes it fit{least}: take more memory or a smaller model"


def _longest_context(plan: Plan) -> int:
    """Return the longest context that fits of the halves of the wanted one, 0 if none does."""
    context = plan.workload.context // 2
    while context and not estimate(replace(plan, workload=Workload(context, plan.workload.batch))).runs:
        context //= 2
    return context


def _unused_device(plan: Plan) -> str:
    least = estimate(replace(plan, fraction=0.0)).device
    assert least is not None
    if least.fits:
        return "the device is not used: the CPU alone is predicted to be faster"
    return (
        f"the device is not used: without any experts it needs {_gb(least.used)} (weights beside them, cache, buffers, "
        f"reserve), but has {_gb(least.capacity or 0)}"
    )


def _gb(size: float) -> str:
    return f"{size / _GB:.1f} GB"
