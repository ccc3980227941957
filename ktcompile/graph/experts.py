"""What an experts module of transformers computes, read off the module and checked by running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from ktcompile.ops import reference
from ktcompile.ops.spec import Activation, ExpertsSpec

# What `use_experts_implementation` puts on a module.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_LIMITS = ("limit", "swiglu_limit")
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class ExpertsFacts:
    """An experts module that the kernels can run: its spec, and the names of its parameters in the order of
    `kt::experts` (gate_up_proj, down_proj, gate_up_bias, down_bias; None: it has none)."""

    spec: ExpertsSpec
    parameters: tuple[str, str, str | None, str | None]


def describe(module: nn.Module) -> ExpertsFacts | str:
    """Return the facts about an experts module, or the reason why the kernels cannot run it.

    The activation is not taken from a list of classes: candidates are made from the module's attributes, and
    one is accepted only if it equals what the module's own `_apply_gate` or `act_fn` returns on test values.
    """
    name = type(module).__name__
    missing = [flag for flag in _FLAGS if not hasattr(module, flag)]
    if missing:
        return f"{name} lacks {', '.join(missing)}, which transformers' decorator sets"
    if getattr(module, "has_post_expert_norm", False):  # transformers before 5.18 has no such experts
        return f"{name} normalises each expert's output before weighting it, which the kernels do not do yet"
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = (up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else (None, None)))
    for parameter in names:
        if parameter is not None and not isinstance(getattr(module, parameter, None), torch.Tensor):
            return f"{name} has no tensor {parameter}"
    layout = ExpertsSpec(
        interleaved=bool(module.has_gate and not module.is_concatenated),
        transposed=bool(module.is_transposed),
    )
    activation = _activation(module, layout.interleaved)
    if activation is None:
        return f"{name} has an activation that the kernels do not know ({_activation_name(module)})"
    return ExpertsFacts(replace(layout, activation=activation), names)


def _activation(module: nn.Module, interleaved: bool) -> Activation | None:
    generator = torch.Generator().manual_seed(0)
    limit = next((float(v) for v in _attributes(module, _LIMITS) if v), 0.0)
    x = torch.randn(16, _width(module), generator=generator) * max(3.0, limit)
    try:
        with torch.no_grad():
            wanted = module._apply_gate(x) if module.has_gate else module.act_fn(x)  # type: ignore[operator]
    except Exception:  # another library's code on made-up input: any failure means "not known"
        return None
    for candidate in _candidates(module, limit):
        got = reference.activate(x, candidate, interleaved)
        if got.shape == wanted.shape and torch.allclose(got, wanted.float(), rtol=_TOLERANCE, atol=_TOLERANCE):
            return candidate
    return None


def _candidates(module: nn.Module, limit: float) -> Iterator[Activation]:
    kinds = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2")
    gated = bool(module.has_gate)
    for kind in kinds:
        yield Activation(kind, gated)
        if gated and limit:
            yield Activation(kind, gated, limit=limit)
    if gated:
        for alpha in {float(a) for a in _attributes(module, ("alpha", "swiglu_alpha")) if a}:
            yield Activation("swigluoai", alpha=alpha, limit=limit)


def _attributes(module: nn.Module, names: tuple[str, ...]) -> Iterator[float]:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, (int, float)):
                yield value


def _width(module: nn.Module) -> int:
    """Columns of the first product: an `_apply_gate` may cut at a fixed place."""
    weight = module.gate_up_proj if module.has_gate else module.up_proj
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[2 if module.is_transposed else 1])


def _activation_name(module: nn.Module) -> str:
    gate = getattr(module._apply_gate, "__qualname__", "?") if module.has_gate else "not gated"
    return f"act_fn {type(getattr(module, 'act_fn', None)).__name__}, _apply_gate {gate}"
