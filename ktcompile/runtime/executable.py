"""Binds a rewritten graph to packed weights, and calls it with the arguments of the original graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ktcompile.graph.owners import ParameterOwners
from ktcompile.graph.packed import PACKED, GivenInput, PackedInput
from ktcompile.ops.experts import PackedExperts, from_handle
from ktcompile.ops.store import ExpertStore, expert_store
from ktcompile.runtime.devices import Placer
from ktcompile.runtime.take import take_weights

InnerCompiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Executable:
    """Calls a compiled graph. Arguments that only served to pack weights stay outside of it."""

    def __init__(
        self,
        inner: Callable[..., Any],
        kept: Sequence[int],
        layers: Sequence[PackedInput | GivenInput],
        made: Sequence[int],
        store: ExpertStore,
        placer: Placer | None,
    ) -> None:
        self._inner = inner
        self._kept = tuple(kept)
        # made: of which layers the graph is given the handle, in the order of its inputs.
        self._layers, self._made = tuple(layers), tuple(made)
        self._store = store
        self._placer = placer
        self._top_k = [layer.top_k for layer in layers]

    def __call__(self, *args: Any) -> Any:
        layers = [self._packed(args, layer) for layer in self._layers]
        given = [*(args[i] for i in self._kept), *(layers[i].handle for i in self._made)]
        if self._placer is None:
            return self._inner(*given)
        self._placer.ensure(layers, self._top_k)  # others than those it was built with have the same shapes
        result = self._inner(*given)
        self._placer.step(layers)
        return result

    def _packed(self, args: Sequence[Any], layer: PackedInput | GivenInput) -> PackedExperts:
        if isinstance(layer, GivenInput):
            return from_handle(args[layer.position])
        return self._store.get(_weights(args, layer), layer.spec)


def build(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    take: bool,
    compile_inner: InnerCompiler,
    placer: Placer | None = None,
) -> Callable[..., Any]:
    """Return `gm` compiled by `compile_inner`, to be called with the inputs of the original graph.

    take: free the weights' source storage after packing. placer: None where there is no device.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = _layers(gm, placeholders)
    packed = [n.meta[PACKED] for n in placeholders if PACKED in n.meta]
    if not packed and (placer is None or not inputs):
        return compile_inner(gm, list(example_inputs))
    store, owners = expert_store(), ParameterOwners()
    layers = []
    for p in inputs:
        if isinstance(p, GivenInput):
            layers.append(from_handle(example_inputs[p.position]))
            continue
        weights = _weights(example_inputs, p)
        layers.append(_take(store, owners, weights, p) if take else store.get(weights, p.spec))
    if placer is not None:
        placer.keep(layers, [p.top_k for p in inputs])
    replaced = {i for p in packed for i in p.positions if i is not None}
    kept = []
    for i, node in enumerate(placeholders[: len(example_inputs)]):
        if i in replaced and not node.users:
            gm.graph.erase_node(node)
        else:
            kept.append(i)
    gm.recompile()
    made = [inputs.index(p) for p in packed]
    inner = compile_inner(gm, [*(example_inputs[i] for i in kept), *(layers[i].handle for i in made)])
    return Executable(inner, kept, inputs, made, store, placer)


def _layers(gm: fx.GraphModule, placeholders: Sequence[fx.Node]) -> list[PackedInput | GivenInput]:
    """Return where the packed weights of each layer come from, in the order of the graph."""
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


def _take(
    store: ExpertStore, owners: ParameterOwners, weights: list[torch.Tensor | None], packed: PackedInput
) -> PackedExperts:
    owner = None if weights[0] is None else owners.find(weights[0])
    if owner is None:
        raise ValueError("weights='take' needs weights that are parameters of a module; use weights='copy'")
    return take_weights(store, owner.module, weights, packed.spec)


def _weights(args: Sequence[Any], packed: PackedInput) -> list[torch.Tensor | None]:
    return [None if i is None else args[i] for i in packed.positions]
