"""The experts implementation "kt" of transformers: `from_pretrained(..., experts_implementation="kt")`."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ktcompile.graph.experts import describe
from ktcompile.log import warn_once
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.store import expert_store
from ktcompile.quant import check_format
from ktcompile.runtime.take import take_weights

NAME = "kt"


def register() -> None:
    """Register "kt" with transformers. Where transformers is absent or too old there is nothing to do."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:
        return
    FP8ExpertsInterface.register(NAME, fp8_experts_forward)


def configure(model: nn.Module, weight_format: str) -> list[nn.Module]:
    """Have the experts of `model` stored in `weight_format`, and return the modules that the kernels run.

    weight_format: as for `ktcompile.ops.pack_experts`. It holds for the implementation "kt"; a compiled model has
    an option of the backend. ValueError: there is no such format.
    """
    check_format(weight_format)
    configured = []
    for module in model.modules():
        if not hasattr(module, "has_gate"):  # set by transformers' decorator of experts classes
            continue
        spec, names, reason = _facts(module)
        if not reason:
            spec = replace(ExpertsSpec.decode(spec), weight_format=weight_format).encode()
            _known[module] = spec, names, reason
            configured.append(module)
    return configured


def take(module: nn.Module) -> None:
    """Pack the experts of a module that `configure` returned, and free the source of the weights.

    The parameters then read as NaN, and state_dict returns the weights unpacked.
    """
    spec, names, reason = _facts(module)
    assert not reason
    weights = [None if name is None else getattr(module, name) for name in names]
    take_weights(expert_store(), module, weights, ExpertsSpec.decode(spec))


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the experts' output, [T, H], from the kernels, or from grouped_mm where they cannot run it.

    hidden_states: [T, H]. top_k_index, top_k_weights: [T, K].
    """
    spec, names, reason = _facts(module)
    if not reason and torch.is_grad_enabled() and (hidden_states.requires_grad or _is_trained(module)):
        reason = "gradients are enabled; the fused experts only run forward, under torch.no_grad()"
    if reason:
        return _stock(module, hidden_states, top_k_index, top_k_weights, reason)
    weights = [None if name is None else getattr(module, name) for name in names]
    result: torch.Tensor = torch.ops.kt.experts(hidden_states, top_k_index, top_k_weights, *weights, spec)
    return result


def fp8_experts_forward(module: Any, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return the experts' output of an FP8 checkpoint, from transformers' own grouped_mm."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    _log(f"{type(module).__name__}: FP8 experts are left to the stock implementation")
    result: torch.Tensor = ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"](module, *args, **kwargs)
    return result


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _stock(module: nn.Module, *args: Any) -> torch.Tensor:
    from transformers.integrations.moe import grouped_mm_experts_forward

    *inputs, reason = args
    _log(f"{type(module).__name__} is left to the stock implementation: {reason}")
    result: torch.Tensor = grouped_mm_experts_forward(module, *inputs)
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _log(message: str) -> None:
    warn_once(message)


_known: weakref.WeakKeyDictionary[nn.Module, tuple[str, tuple[str | None, ...], str]] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _facts(module: nn.Module) -> tuple[str, tuple[str | None, ...], str]:
    """Return (encoded spec, names of parameters, "") or ("", (), reason)."""
    if module not in _known:
        facts = describe(module)
        if isinstance(facts, str):
            _known[module] = "", (), facts
        else:
            _known[module] = facts.spec.encode(), facts.parameters, ""
    return _known[module]
