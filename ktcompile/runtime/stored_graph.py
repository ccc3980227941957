"""Graphs of parts as JSON, so that a later process runs one that it did not trace.

What a node calls is stored by its name: a method, an operator of torch, or a function that computes on tensors, of the
modules below. A file can so have no other code called.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ktcompile.runtime.program import Part, function_of
from ktcompile.runtime.program_record import ProgramRecord

_MODULES = ("torch.nn.functional", "torch.functional", "torch._C._nn", "_operator", "ktcompile.runtime.direct")
_OF_TORCH = torch._C._VariableFunctions  # its functions are torch's, which names no module for them
_OPERATORS, _OWN = "torch.ops", "ktcompile.ops."
_PLAIN = (bool, int, float, str, type(None))


class NotStorableError(Exception):
    """A graph has something that has no name."""


def to_json(graph: fx.Graph) -> dict[str, Any]:
    """Return a graph of `with_programs` as JSON has it. NotStorableError: it cannot be stored."""
    parts: list[ProgramRecord] = []
    nodes = []
    for node in graph.nodes:
        if node.op == "get_attr":
            raise NotStorableError(f"{node.target} of a module")
        target = node.target
        if node.op == "call_function":
            part = getattr(target, "part", None)
            if isinstance(part, Part):
                parts.append(part.record)
                target = {"part": len(parts) - 1}
            else:
                target = _name_of(target)
        arguments = [_encoded(node.args), {key: _encoded(value) for key, value in node.kwargs.items()}]
        nodes.append([node.op, node.name, target, *arguments])
    return {"parts": parts, "nodes": nodes}


def of_json(stored: dict[str, Any]) -> fx.GraphModule:
    """Return the graph that `to_json` gave, ready to be called. ValueError: it is of another version."""
    parts = [Part(ProgramRecord.of_json(record)) for record in stored["parts"]]
    graph, values = fx.Graph(), dict[str, fx.Node]()
    for op, name, target, args, kwargs in stored["nodes"]:
        if op == "call_function":
            target = function_of(parts[target["part"]]) if isinstance(target, dict) else _function(target)
        given = {key: _decoded(value, values) for key, value in kwargs.items()}
        values[name] = graph.create_node(op, target, _decoded(args, values), given, name)
    return fx.GraphModule(torch.nn.Module(), graph)


def _name_of(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        names = [f"{_OPERATORS}:{function}"]
    else:
        module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
        names = [f"{module}:{name}", f"torch:{name}"]
    for name in names:
        try:
            if _function(name) is function:
                return name
        except ValueError:
            continue
    raise NotStorableError(f"the function {function}")


def _function(name: str) -> Callable[..., Any]:
    """Return what has a name. ValueError: nothing has, or it is no function that a graph may call."""
    module, _, path = name.partition(":")
    known = module in _MODULES or module == _OPERATORS or module.startswith(_OWN)
    if not known and not (module == "torch" and hasattr(_OF_TORCH, path)):
        raise ValueError(f"a graph calls {name}")
    try:
        found = pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"a graph calls {name}: {error}") from error
    if not callable(found):
        raise ValueError(f"a graph calls {name}, which is no function")
    return found  # type: ignore[no-any-return]


def _encoded(x: Any) -> Any:
    """Return what an argument of a node is as JSON: itself, or a list of its kind and what it is made of."""
    if isinstance(x, fx.Node):
        return ["node", x.name]
    if isinstance(x, (tuple, list)):
        return ["tuple" if isinstance(x, tuple) else "list", *map(_encoded, x)]
    if isinstance(x, slice):
        return ["slice", *map(_encoded, (x.start, x.stop, x.step))]
    if isinstance(x, torch.dtype):
        return ["dtype", str(x).removeprefix("torch.")]
    if isinstance(x, torch.device):
        return ["device", str(x)]
    if x is Ellipsis:
        return ["..."]
    if type(x) in _PLAIN:
        return x
    raise NotStorableError(f"an argument of {type(x).__name__}")


def _decoded(x: Any, values: dict[str, fx.Node]) -> Any:
    if not isinstance(x, list):
        return x
    kind, *parts = x
    match kind:
        case "node":
            return values[parts[0]]
        case "dtype":
            return getattr(torch, parts[0])
        case "device":
            return torch.device(parts[0])
        case "...":
            return Ellipsis
    made = [_decoded(part, values) for part in parts]
    return tuple(made) if kind == "tuple" else slice(*made) if kind == "slice" else made
