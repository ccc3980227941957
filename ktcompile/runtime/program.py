"""Runs the parts of a graph that the kernels have, each by one call.

Between two kernels of one token that read their weights from memory, nothing of Python is left in the caches, and an
operation costs tens of microseconds for its kernel's few. So nodes that have a step in `_native.Program` are gathered
in as few parts as their order allows, and a part is one call, whose steps run without Python.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ktcompile import _native
from ktcompile.log import logger
from ktcompile.machine import machine
from ktcompile.ops.experts import PackedExperts, from_handle
from ktcompile.ops.linear import PackedLinear
from ktcompile.ops.observer import observe
from ktcompile.ops.store import watch_of
from ktcompile.ops.threads import native_threads
from ktcompile.runtime.direct import call_directly
from ktcompile.runtime.program_builder import ELEMENTS, Builder, UnsupportedError, changes_memory, value_of
from ktcompile.runtime.program_record import ProgramRecord
from ktcompile.runtime.program_steps import add_steps

_DTYPES = {element: dtype for dtype, element in ELEMENTS.items()}
# Fewer are not worth a call of their own.
_FEWEST_STEPS = 3
# But those whose elements torch computes otherwise at the end of a tensor, so by how many rows there are.
_BY_PLACE = frozenset({torch.sigmoid, "sigmoid", F.silu, F.gelu})
# What torch rounds otherwise than steps do: calls that run operation by operation have parts of one node for these.
_ROUNDED = _BY_PLACE | {F.softmax, torch.softmax, "softmax", torch.cos, "cos", torch.sin, "sin"}
# Functions whose results may share the memory of their first argument; methods all may.
_VIEWS = (
    *("getitem", "split", "chunk", "tensor_split", "unbind", "transpose", "swapaxes", "permute", "movedim", "t"),
    *("reshape", "flatten", "ravel", "unsqueeze", "squeeze", "select", "narrow", "diagonal", "broadcast_to"),
)
_OF_NUMBERS = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)
_numbers = itertools.count()


def with_programs(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph with the nodes of `gm` of which those that have steps are calls of parts.

    Where nodes change what others do without a tensor between them, all stay in their order, and there are no parts.
    """
    if any(_changes_mode(node) for node in gm.graph.nodes):
        return gm
    _erase_idle(gm.graph)
    stages = _stages(gm.graph)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    nodes = list(gm.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n])
    (output,) = (n for n in nodes if n.op == "output")
    for number in sorted({s for s in stages.values() if s is not None}):
        inside = [n for n in nodes if stages.get(n) == number]
        worth = len(inside) >= _FEWEST_STEPS or any(n.target in _BY_PLACE for n in inside)
        if number % 2 and worth and (part := _part(inside)) is not None:
            _call(graph, part, values)
            continue
        for node in inside:
            values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(fx.map_arg(output.args[0], lambda n: values[n]))
    return fx.GraphModule(gm, graph)


def _stages(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return when each node runs: with those of odd numbers run parts of the kernels, with those of even ones others.

    A node is never before what it reads, nor on another side of a node that changes what it reads.
    """
    stages: dict[fx.Node, int] = {}
    supported: set[fx.Node] = set()
    last_change: dict[fx.Node, int] = {}  # by the node whose memory it is
    last_read: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        least = max((stages.get(n, 0) for n in node.all_input_nodes), default=0)
        roots = {_root(n) for n in node.all_input_nodes}
        least = max([least, *(last_change.get(r, 0) for r in roots)])
        changed = _root(node.all_input_nodes[0]) if changes_memory(node) and node.all_input_nodes else None
        if changed is not None:
            least = max(least, last_read.get(changed, 0))
        native = _is_supported(node, supported)
        if native:
            supported.add(node)
        stages[node] = least if least % 2 == native else least + 1
        for root in roots:
            last_read[root] = max(last_read.get(root, 0), stages[node])
        if changed is not None:
            last_change[changed] = stages[node]
    return stages


def _is_supported(node: fx.Node, supported: set[fx.Node]) -> bool:
    builder = Builder(supported)
    try:
        add_steps(builder, node)
    except UnsupportedError:
        return False
    return True


def _changes_mode(node: fx.Node) -> bool:
    """Return whether a node enters or leaves something, as vmap's and autocast's do."""
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", str(node.target))
    home = str(getattr(node.target, "__module__", "") or "")
    return "functorch" in home or "nesting" in name or name.startswith(("_enter_", "_exit_", "_set_grad_enabled"))


def _erase_idle(graph: fx.Graph) -> None:
    """Erase what nothing comes of."""
    for node in reversed(graph.nodes):
        if node.target is F.embedding and len(node.args) > 4 and node.args[3] is None:
            node.update_arg(4, 2.0)  # the kind of a norm that is not asked for
        if _is_idle(node):
            graph.erase_node(node)


def _is_idle(node: fx.Node) -> bool:
    """Return whether nothing comes of a node, as of numbers that only what passes replaced has read."""
    if node.users:
        return False
    if node.target in ("item", "size", "numel") and node.op == "call_method":
        return True
    if node.target is torch._C._log_api_usage_once:
        return True
    return node.target in _OF_NUMBERS and not any(isinstance(value_of(n), Tensor) for n in node.all_input_nodes)


def _root(node: fx.Node) -> fx.Node:
    """Return the node whose memory a node may be a view of."""
    while node.op in ("call_method", "call_function") and node.all_input_nodes and _may_be_view(node):
        node = node.all_input_nodes[0]
    return node


def _may_be_view(node: fx.Node) -> bool:
    return node.op == "call_method" or getattr(node.target, "__name__", "") in _VIEWS


class Part:
    """Nodes that run as one program, whose arguments come first in a call. plain: what runs them one by one, where
    somebody has to see what experts are asked for; None: that cannot be seen."""

    def __init__(self, record: ProgramRecord, plain: Callable[..., tuple[Tensor, ...]] | None = None) -> None:
        self.record = record
        begin = len(record.tensors) + record.whole + record.real
        self._packed = slice(begin, begin + record.packed)
        self._program = record.program()
        # The layers of the call before, and what it was given for them: themselves, or their handles.
        self._layers: list[Callable[[], Any]] = []
        self._given: list[Callable[[], Any]] = []
        self._handles = _native.Watch()
        self._storages: tuple[Any, ...] = ()  # kept so that no other has its address
        self._has_experts = False
        self._plain = plain
        self._isa = machine().isa

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        if not self._bind(args):
            if self._plain is None:
                raise RuntimeError("what experts are asked for cannot be seen in a model that was not traced")
            return self._plain(*args)
        made: list[Tensor] = []

        def allocate(element: _native.Element, shape: Sequence[int]) -> int:
            made.append(torch.empty(shape, dtype=_DTYPES[element]))
            return made[-1].data_ptr()

        found = self._program.run(native_threads().context(), self._isa, args, allocate)
        return tuple(_view(made, args, *place) for place in found)

    def _bind(self, args: tuple[Any, ...]) -> bool:
        """Give the program its weights; return whether it can run: nobody has to see what experts are asked for."""
        given = args[self._packed]
        if not self._are_bound(args, given):
            layers: list[Any] = [_layer(g) for g in given]
            experts = [layer for layer in layers if isinstance(layer, PackedExperts)]
            if any(layer.split is not None or layer.first_call is not None for layer in experts):
                return False
            for i, layer in enumerate(layers):
                set_layer = self._program.set_linear if isinstance(layer, PackedLinear) else self._program.set_experts
                set_layer(i, layer.native, layer.isa)
            self._see(args, layers)
        return not (observe.active and self._has_experts)

    def _are_bound(self, args: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
        """Return whether the program has the weights of a call."""
        return (
            len(self._given) == len(given)
            and self._handles.holds(args)
            and all(seen() is g for seen, g in zip(self._given, given, strict=True))
            and all(layer() is not None for layer in self._layers)
        )

    def _see(self, args: tuple[Any, ...], layers: Sequence[Any]) -> None:
        given = args[self._packed]
        self._has_experts = any(isinstance(layer, PackedExperts) for layer in layers)
        handles = [i for i, g in enumerate(given, self._packed.start) if isinstance(g, Tensor)]
        if any(args[i].is_inference() for i in handles):  # these have no versions
            return
        self._given = [weakref.ref(g) for g in given]
        self._layers = [weakref.ref(layer) for layer in layers]
        self._handles, self._storages = watch_of(args, handles)


def _layer(given: PackedExperts | PackedLinear | Tensor) -> PackedExperts | PackedLinear:
    """Return a packed layer; a model that holds it packed gives its handle."""
    return from_handle(given) if isinstance(given, Tensor) else given


def _view(
    made: Sequence[Tensor], args: Sequence[Tensor], where: int, offset: int, shape: list[int], strides: list[int]
) -> Tensor:
    if where < 0:
        base = args[-1 - where]
        return base.as_strided(shape, strides, base.storage_offset() + offset)
    base = made[where]
    if offset == 0 and list(base.shape) == shape and list(base.stride()) == strides:
        return base
    return base.as_strided(shape, strides, offset)


class _Nodes(NamedTuple):
    """What is a part. inputs: what it is called with. outputs: what it returns."""

    part: Part
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def _part(nodes: Sequence[fx.Node]) -> _Nodes | None:
    builder, inside = Builder(set(nodes)), set(nodes)
    try:
        for node in nodes:
            add_steps(builder, node)
        outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        if any(n not in builder.arrays for n in outputs):
            raise UnsupportedError("several values that leave it as one")
    except UnsupportedError as error:
        logger.debug("a part of a graph runs operation by operation: %s", error)
        return None
    inputs = builder.inputs
    # What no step reads is there for `_plain`.
    inputs += dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside and i not in inputs)
    return _Nodes(Part(builder.record(outputs), _plain(nodes, inputs, outputs)), inputs, outputs)


def _plain(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Callable[..., Any]:
    """Return what runs the nodes one after the other."""
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        values[node] = graph.placeholder(node.name)
    for node in nodes:
        part = _part([node]) if len(nodes) > 1 and node.target in _ROUNDED else None
        if part is not None:
            _call(graph, part, values)
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[n] for n in outputs))
    plain = fx.GraphModule(torch.nn.Module(), graph)
    call_directly(plain)
    return plain.forward


def _call(graph: fx.Graph, nodes: _Nodes, values: dict[fx.Node, fx.Node]) -> None:
    """Add the call of a part to a graph."""
    results = graph.call_function(function_of(nodes.part), tuple(values[n] for n in nodes.inputs))
    for i, node in enumerate(nodes.outputs):
        values[node] = graph.call_function(operator.getitem, (results, i))


def function_of(part: Part) -> Callable[..., tuple[Tensor, ...]]:
    """Return what nodes of a graph call for a part, and have as its `part`."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        return part(*args)

    run.__name__ = run.__qualname__ = f"part_{next(_numbers)}"  # a name that the graph's own code can have
    run.part = part  # type: ignore[attr-defined]
    return run
