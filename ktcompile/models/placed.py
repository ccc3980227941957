"""Models that run without a compiler, with a part of their experts on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktcompile.models import config_fields, hf_experts
from ktcompile.ops.experts import PackedExperts
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.metrics import ExpertMetrics, metrics_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, placer: Placer) -> None:
    """Put a part of a model's experts on a device now, and let them follow its calls.

    The model runs the implementation "kt"; its weights are packed if they were not. A compiled graph of the model has
    an option of the backend. ValueError: it has no experts that the kernels can run.
    """
    modules = hf_experts.experts_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no experts that a device could have")
    top_k = config_fields.top_k(model.config.get_text_config().to_dict())
    if placer.where.type != "cpu":
        move(model, placer.where)
    placed = _Placed(placer, modules, top_k)
    placer.place(placed.layers(), placed.top_k)
    model.register_forward_pre_hook(placed.before)
    model.register_forward_hook(placed.after)


def move(model: PreTrainedModel, where: torch.device) -> None:
    """Move all of a model but its experts, which stay where the CPU can read them."""
    stay = {id(part) for module in hf_experts.experts_modules(model) for part in module.modules()}
    moved: dict[int, nn.Parameter] = {}  # what several modules share stays shared
    for module in model.modules():
        if id(module) in stay:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(parameter.detach().to(where), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(where)


def expert_metrics(model: nn.Module) -> ExpertMetrics:
    """Return where the experts of a model are and what they did since they were put there.

    It is what each layer's newest placement counted, of a model of `ktcompile.load` or a compiled one after its first
    call. ValueError: no expert of the model was given to a device, or none yet.
    """
    layers = []
    for module in hf_experts.experts_modules(model):
        split = [experts for experts in hf_experts.packed_forms(module) if experts.split is not None]
        layers += split[-1:]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no experts on a device: name one when it is loaded or compiled, and call a "
            "compiled model first"
        )
    return metrics_of(layers)


class _Placed:
    """The hooks of a model. Weights that were written to are packed anew, so layers are looked up at each call."""

    def __init__(self, placer: Placer, modules: list[nn.Module], top_k: int) -> None:
        self._placer, self._modules = placer, modules
        self.top_k = [top_k] * len(modules)

    def layers(self) -> list[PackedExperts]:
        return [hf_experts.packed(module) for module in self._modules]

    def before(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._placer.ensure(self.layers(), self.top_k)

    def after(self, model: nn.Module, args: Any, result: Any) -> None:
        if not torch.compiler.is_compiling():
            self._placer.step(self.layers())
