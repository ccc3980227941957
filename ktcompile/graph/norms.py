"""What a normalisation module computes, checked by running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, slots=True)
class NormFacts:
    """The settings of `ktcompile.ops.rms_norm`."""

    epsilon: float
    offset: float
    round_first: bool


def describe_norm(module: nn.Module) -> NormFacts | None:
    """Return what a root-mean-square normalisation is; None: the module is none that the kernels know.

    No list of classes is asked: settings are tried until one gives, in bf16, the bits of the module's own forward.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1 or any(module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, len(weight), generator=generator).bfloat16() * 3
    trial = torch.randn(len(weight), generator=generator).bfloat16()
    try:
        with torch.no_grad():
            wanted = torch.func.functional_call(module, {"weight": trial}, (x,))
    except Exception:  # another library's code on made-up input: any failure means "not known"
        return None
    epsilon = epsilon_of(module)
    if epsilon is None or not isinstance(wanted, torch.Tensor):
        return None
    for offset in (0.0, 1.0):
        for round_first in (True, False):
            facts = NormFacts(epsilon, offset, round_first)
            if torch.equal(reference_norm(x, trial, facts), wanted):
                return facts
    return None


def epsilon_of(module: nn.Module) -> float | None:
    """Return what a normalisation adds to the mean; None: it is not known."""
    values = (getattr(module, name, None) for name in _EPSILONS)
    return next((v for v in values if isinstance(v, float)), None)


def reference_norm(x: torch.Tensor, weight: torch.Tensor, facts: NormFacts) -> torch.Tensor:
    """Return in plain torch what `ktcompile.ops.rms_norm` computes, but for the order of its sums."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + facts.epsilon)
    if facts.round_first:
        y = y.to(x.dtype).float()
    return ((weight.float() + facts.offset) * y).to(x.dtype)
