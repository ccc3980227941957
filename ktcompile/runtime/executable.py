"""Binds a rewritten graph to packed weights, and calls it with the arguments of the original graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ktcompile import _native
from ktcompile.graph.gradients import needs_gradients
from ktcompile.graph.owners import ParameterOwners
from ktcompile.graph.packed import PACKED, GivenInput, PackedInput
from ktcompile.ops.experts import PackedExperts, from_handle
from ktcompile.ops.linear import PackedLinear
from ktcompile.ops.spec import LatentsSpec, LinearSpec
from ktcompile.ops.store import Weights, expert_store, latents_store, linear_store, watch_of
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.direct import call_directly
from ktcompile.runtime.program import with_programs
from ktcompile.runtime.take import take_weights

InnerCompiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Executable:
    """Calls a compiled graph. Arguments that only served to pack weights stay outside of it.

    experts: where the layers come from that `placer` places, in the order of the graph. direct: `inner` takes packed
    layers where others take their handles.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        kept: Sequence[int],
        packed: Sequence[PackedInput],
        experts: Sequence[PackedInput | GivenInput],
        placer: Placer | None,
        direct: bool,
    ) -> None:
        self._inner = inner
        self._direct = direct
        self._kept = tuple(kept)
        self._found = _Found(packed)
        self._placer = placer
        self._experts = [e.position if isinstance(e, GivenInput) else _Made(packed.index(e)) for e in experts]
        self._top_k = [_top_k(e) for e in experts]

    def __call__(self, *args: Any) -> Any:
        layers = self._found.layers(args)
        given = [*(args[i] for i in self._kept), *(layers if self._direct else [layer.handle for layer in layers])]
        if self._placer is None or not self._experts:
            return self._inner(*given)
        experts: list[Any] = [layers[e.place] if isinstance(e, _Made) else from_handle(args[e]) for e in self._experts]
        self._placer.ensure(experts, self._top_k)  # others than those it was built with have the same shapes
        result = self._inner(*given)
        self._placer.step(experts)
        return result

    def with_layers_of(self, args: Sequence[Any]) -> WithLayers | None:
        """Return what computes the graph with the packed layers of a call, whatever becomes of their weights. None: a
        placer has to see each call."""
        if self._placer is not None:
            return None
        layers = self._found.layers(tuple(args))
        module = getattr(self._inner, "__self__", None)  # where nothing compiled the graph
        graph = module.graph if self._direct and isinstance(module, fx.GraphModule) else None
        packed = layers if self._direct else [layer.handle for layer in layers]
        return WithLayers(self._inner, self._kept, packed, graph)


class WithLayers(NamedTuple):
    """`inner`, given those arguments of a call that are `kept` and the packed `layers` behind them, computes it. graph:
    what it runs, None if that is compiled."""

    inner: Callable[..., Any]
    kept: tuple[int, ...]
    layers: Sequence[Any]
    graph: fx.Graph | None


class _Made(NamedTuple):
    """One of the layers that the executable packed."""

    place: int


class _Found:
    """The packed layers of the weights of the call before, which are nearly always those of the next."""

    def __init__(self, packed: Sequence[PackedInput]) -> None:
        self._packed = tuple(packed)
        self._watch: _native.Watch | None = None
        self._layers: list[Callable[[], Any]] = []
        self._storages: tuple[Any, ...] = ()

    def layers(self, args: tuple[Any, ...]) -> list[Any]:
        """Return the packed layers of the arguments of a call."""
        if self._watch is not None and self._watch.holds(args):
            layers = [layer() for layer in self._layers]
            if all(layer is not None for layer in layers):
                return layers
        layers = [_get(p, _weights(args, p)) for p in self._packed]
        self._see(args, layers)
        return layers

    def _see(self, args: Sequence[Any], layers: Sequence[Any]) -> None:
        positions = sorted({i for p in self._packed for i in p.positions if i is not None})
        self._watch = None
        if any(args[i].is_inference() for i in positions):  # these have no versions
            return
        self._layers = [weakref.ref(layer) for layer in layers]
        self._watch, self._storages = watch_of(args, positions)


def build(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    take_from: ParameterOwners | None,
    inner: InnerCompiler | str,
    placer: Placer | None = None,
) -> Callable[..., Any]:
    """Return `gm`, to be called with the inputs of the original graph.

    take_from: whose weights' source storage is freed after packing; None: it is kept. inner: what compiles the graph
    that is left; "program": nothing does, and what the kernels have runs as programs; "eager": all nodes run one by
    one. placer: None where there is no device.
    """
    direct = isinstance(inner, str) and placer is None and not needs_gradients(example_inputs)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    packed = [n.meta[PACKED] for n in placeholders if PACKED in n.meta]
    experts = _experts(gm, placeholders)
    if not packed and (placer is None or not experts):
        return _run_by(inner, gm, list(example_inputs), direct)
    replaced = {i for p in packed for i in p.positions if i is not None and not placeholders[i].users}
    layers = []
    for p in packed:
        weights = _weights(example_inputs, p)
        alone = replaced.issuperset(i for i in p.positions[: p.spec.weights] if i is not None)
        layers.append(_take(take_from, weights, p) if take_from and alone else _get(p, weights))
    if placer is not None and experts:
        placed: list[Any] = [
            from_handle(example_inputs[e.position]) if isinstance(e, GivenInput) else layers[packed.index(e)]
            for e in experts
        ]
        placer.keep(placed, [_top_k(e) for e in experts])
    for i in replaced:
        gm.graph.erase_node(placeholders[i])
    kept = [i for i in range(len(example_inputs)) if i not in replaced]
    gm.recompile()
    given = [*(example_inputs[i] for i in kept), *(layer.handle for layer in layers)]
    return Executable(_run_by(inner, gm, given, direct), kept, packed, experts, placer, direct)


def _run_by(
    inner: InnerCompiler | str, gm: fx.GraphModule, example_inputs: list[Any], direct: bool
) -> Callable[..., Any]:
    """Return what runs a graph. direct: kernels are called without torch's dispatcher."""
    if not isinstance(inner, str):
        return inner(gm, example_inputs)
    if direct:
        gm = with_programs(gm) if inner == "program" else gm
        call_directly(gm)
    return gm.forward


def _experts(gm: fx.GraphModule, placeholders: Sequence[fx.Node]) -> list[PackedInput | GivenInput]:
    """Return where the packed experts of each layer come from, in the order of the graph."""
    found: list[PackedInput | GivenInput] = []
    for node in gm.graph.nodes:
        if node.target not in (torch.ops.kt.moe.default, torch.ops.kt.moe_submit.default):
            continue
        _, ids, _, handle = node.args
        if PACKED in handle.meta:
            found.append(handle.meta[PACKED])
        elif handle in placeholders:
            top_k = int(ids.meta["example_value"].shape[1])
            found.append(GivenInput(placeholders.index(handle), top_k))
    return found


def _top_k(layer: PackedInput | GivenInput) -> int:
    assert layer.top_k is not None
    return layer.top_k


def _get(packed: PackedInput, weights: Weights) -> PackedExperts | PackedLinear:
    spec = packed.spec
    if isinstance(spec, LinearSpec):
        return linear_store().get(weights, spec)
    if isinstance(spec, LatentsSpec):
        latents = latents_store().get(weights, spec)
        return latents.keys if packed.part == "keys" else latents.values
    return expert_store().get(weights, spec)


def _take(owners: ParameterOwners, weights: Weights, packed: PackedInput) -> PackedExperts | PackedLinear:
    modules, spec = [], packed.spec
    for weight in weights[: spec.weights]:
        owner = None if weight is None else owners.find(weight)
        if owner is None:
            raise ValueError("weights='take' needs weights that are parameters of a module; use weights='copy'")
        modules.append(owner.module)
    if isinstance(spec, LinearSpec):
        return take_weights(linear_store(), modules, weights, spec)
    if isinstance(spec, LatentsSpec):
        take_weights(latents_store(), modules, weights, spec)
        return _get(packed, weights)
    return take_weights(expert_store(), modules, weights, spec)


def _weights(args: Sequence[Any], packed: PackedInput) -> list[torch.Tensor | None]:
    return [None if i is None else args[i] for i in packed.positions]
