"""The experts implementation "kt" of transformers: `from_pretrained(..., experts_implementation="kt")`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ktcompile.graph.experts import describe
from ktcompile.models.fp8_experts import Fp8Weights, fp8_experts
from ktcompile.models.traced import note, run_as_traced
from ktcompile.ops.experts import PackedExperts, from_handle
from ktcompile.ops.modules import alive_modules
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.store import expert_store
from ktcompile.quant import check_format
from ktcompile.runtime.take import take_weights

NAME = "kt"
_HANDLE = "packed_experts"  # the buffer that `adopt` adds
_FACTS = "_kt_facts"  # the attribute that `_facts` reads


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
    an option of the backend. Modules whose weights are quantised already are left as they are. ValueError: there is
    no such format.
    """
    check_format(weight_format)
    configured = []
    for module in model.modules():
        if not hasattr(module, "has_gate"):  # set by transformers' decorator of experts classes
            continue
        if is_packed(module) or _holds_codes(module):
            continue
        spec, names, reason = _facts(module)
        if not reason:
            spec = replace(ExpertsSpec.decode(spec), weight_format=weight_format).encode()
            _put_facts(module, spec, names)
            configured.append(module)
    return configured


def take(module: nn.Module) -> None:
    """Pack the experts of a module that `configure` returned, and free the source of the weights.

    The parameters then read as NaN, and state_dict returns the weights unpacked.
    """
    spec, names, reason = _facts(module)
    assert not reason
    take_weights(expert_store(), [module, module], _weights(module, names), ExpertsSpec.decode(spec))


def adopt(module: nn.Module, packed: PackedExperts) -> None:
    """Have the implementation "kt" run a module's experts from `packed`, which alone holds their weights.

    The parameters keep their shape and read as NaN, so that a use by other code shows; they take no memory. state_dict
    returns the weights, dequantised. load_state_dict needs assign=True, after which the assigned weights are used.
    """
    names = _facts(module)[1][:2]
    for name in names:
        assert name is not None
        old = getattr(module, name)
        setattr(module, name, _absent(torch.full((), torch.nan, dtype=old.dtype), old.shape))
    # A buffer is an input of a compiled graph, where another handle can be passed.
    module.register_buffer(_HANDLE, packed.handle, persistent=False)
    module.register_state_dict_post_hook(_unpack)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_refuse_copies)  # type: ignore[no-untyped-call]
    module._apply = partial(_apply, module)  # type: ignore[method-assign]
    _adopted[module] = packed


def is_packed(module: nn.Module) -> bool:
    """Return whether the module's weights exist only packed, by `adopt`."""
    return _HANDLE in module._buffers and _is_absent(module.down_proj)  # type: ignore[arg-type]


def handle(module: nn.Module) -> torch.Tensor:
    """Return what stands for a module's packed experts in graphs. Only if `is_packed`."""
    return module.get_buffer(_HANDLE)


def absent(module: nn.Module) -> list[str]:
    """Return the names of those tensors of a module that hold nothing by themselves, since `adopt` was called."""
    return [*(name for name in _facts(module)[1][:2] if name is not None), _HANDLE] if is_packed(module) else []


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model whose experts the kernels can run, in order."""
    marked = (m for m in model.modules() if hasattr(m, "has_gate"))  # set by transformers' decorator
    return [m for m in marked if not _facts(m)[2]]


def shape(model: nn.Module) -> tuple[int, int]:
    """Return how many layers have such modules, and the most experts that one has."""
    counts = [module.get_parameter("down_proj").shape[0] for module in experts_modules(model)]
    return len(counts), max(counts, default=0)


def packed_forms(module: nn.Module) -> list[PackedExperts]:
    """Return the packed experts of a module: those that `adopt` was given, or all that its weights were packed to."""
    if is_packed(module):
        return [from_handle(handle(module))]
    _, names, reason = _facts(module)
    assert not reason
    return expert_store().find_all(_weights(module, names))


def packed(module: nn.Module) -> PackedExperts:
    """Return what the implementation "kt" runs for a module, packed now if it was not."""
    if is_packed(module):
        return from_handle(handle(module))
    spec, names, reason = _facts(module)
    assert not reason
    return expert_store().get(_weights(module, names), ExpertsSpec.decode(spec))


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the experts' output, [T, H], from the kernels, or from grouped_mm where they cannot run it.

    hidden_states: [T, H]. top_k_index, top_k_weights: [T, K].
    """
    result: torch.Tensor
    if is_packed(module):
        result = torch.ops.kt.moe.default(hidden_states, top_k_index, top_k_weights, getattr(module, _HANDLE))
        return result
    spec, names, reason = _facts(module)
    if not reason and torch.is_grad_enabled() and (hidden_states.requires_grad or _is_trained(module)):
        reason = "gradients are enabled; the fused experts only run forward, under torch.no_grad()"
    if reason:
        return _stock(module, hidden_states, top_k_index, top_k_weights, reason)
    weights = _weights(module, names)
    result = torch.ops.kt.experts.default(hidden_states, top_k_index, top_k_weights, *weights, spec)
    return result


def fp8_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the output of transformers' `FP8Experts`, [T, H], from the kernels, or from grouped_mm where they cannot
    run it.

    The weights are packed at the first call as they are stored; the module keeps its own, too (`streaming.load` does
    not). Only weights are in fp8: hidden states are not quantised, as transformers does for both activation schemes,
    so that the result is nearer to that of exact arithmetic than the stock one is.
    """
    spec, names, reason = _facts(module)
    if reason:
        return _stock_fp8(module, hidden_states, top_k_index, top_k_weights, reason)
    weights = Fp8Weights(*(getattr(module, f"{name}{part}") for name in names[:2] for part in ("", "_scale_inv")))
    return fp8_experts(hidden_states, top_k_index, top_k_weights, weights, module.block_size, spec)


def _weights(module: nn.Module, names: Sequence[str | None]) -> list[torch.Tensor | None]:
    return [None if name is None else getattr(module, name) for name in names]


def _holds_codes(module: nn.Module) -> bool:
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, torch.Tensor) and weight.element_size() == 1


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _stock(module: nn.Module, *args: Any) -> torch.Tensor:
    from transformers.integrations.moe import grouped_mm_experts_forward

    *inputs, reason = args
    note(f"{type(module).__name__} is left to the stock implementation: {reason}")
    result: torch.Tensor = grouped_mm_experts_forward(module, *inputs)
    return result


def _stock_fp8(module: nn.Module, *args: Any) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    *inputs, reason = args
    note(f"{type(module).__name__} is left to the stock implementation: {reason}")
    result: torch.Tensor = ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"](module, *inputs)
    return result


def _absent(value: torch.Tensor, shape: torch.Size) -> nn.Parameter:
    """Return a parameter all elements of which are the one of `value`."""
    return nn.Parameter(value.expand(shape), requires_grad=False)


def _is_absent(weight: torch.Tensor) -> bool:
    return not any(weight.stride())


def _apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Convert a module as nn.Module does, for example to another dtype, but of absent weights the one element, since
    the result would have all of them in memory."""
    absent = {n: p for n, p in module._parameters.items() if p is not None and _is_absent(p)}
    for name in absent:
        del module._parameters[name]
    type(module)._apply(module, function, recurse)  # type: ignore[no-untyped-call]
    for name, parameter in absent.items():
        module.register_parameter(name, _absent(function(parameter.detach()[0, 0, 0]), parameter.shape))
    return module


def _unpack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Put the dequantised weights in the place of the NaN. A state_dict hook."""
    packed = _adopted.get(module)
    names = [f"{prefix}{name}" for name in _facts(module)[1][:2]]
    if packed is None or not all(_is_absent(state[name]) for name in names):
        return
    transposed = [state[name].mT if module.is_transposed else state[name] for name in names]
    tensors = [torch.empty(t.shape, dtype=t.dtype) for t in transposed]
    packed.unpack_into(tensors[0], tensors[1])
    for name, tensor in zip(names, tensors, strict=True):
        state[name] = tensor.mT.contiguous() if module.is_transposed else tensor


def _refuse_copies(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
    """Report that there is nothing to copy weights into. A load_state_dict hook."""
    names = [f"{prefix}{name}" for name in _facts(module)[1][:2]]
    if is_packed(module) and not metadata.get("assign_to_params_buffers") and any(name in state for name in names):
        _, _, _, errors = args
        errors.append(f"{' and '.join(names)} exist only packed; use load_state_dict with assign=True")


_adopted: weakref.WeakKeyDictionary[nn.Module, PackedExperts] = weakref.WeakKeyDictionary()


def _facts(module: nn.Module) -> tuple[str, list[str | None], str]:
    """Return (encoded spec, names of parameters, "") or ("", [], reason).

    The module has them as one string, which is what Dynamo guards: layers alike share a graph.
    """
    if torch.compiler.is_dynamo_compiling():
        _describe_all()
    elif _FACTS not in vars(module):
        _describe(module)
    spec, reason, *names = getattr(module, _FACTS).split("\n")
    return spec, [name or None for name in names], reason


@run_as_traced
def _describe_all() -> None:
    """Describe every module that runs the implementation "kt", once for each graph.

    Before torch 2.13 Dynamo cannot give what it runs as it traces a module. It looks at the facts only after this, so
    that it does not guard against their absence.
    """
    graph = torch._guards.TracingContext.get()
    if graph in _described:
        return
    _described.add(graph)
    for module in alive_modules():
        implementation = getattr(vars(module).get("config"), "_experts_implementation", None)
        # The flag is set by transformers' decorator of experts classes.
        if implementation == NAME and "is_transposed" in vars(module) and _FACTS not in vars(module):
            _describe(module)


def _describe(module: nn.Module) -> None:
    facts = describe(module)
    if isinstance(facts, str):
        _put_facts(module, "", (), facts)
    else:
        _put_facts(module, facts.spec.encode(), facts.parameters)


def _put_facts(module: nn.Module, spec: str, names: Sequence[str | None], reason: str = "") -> None:
    setattr(module, _FACTS, "\n".join([spec, reason, *(name or "" for name in names)]))


_described: weakref.WeakSet[torch._guards.TracingContext] = weakref.WeakSet()
