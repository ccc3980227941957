"""The `torch.compile` backend "kt"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ktcompile.config import CompileOptions
from ktcompile.graph import report
from ktcompile.graph.gradients import needs_gradients
from ktcompile.graph.owners import ParameterOwners
from ktcompile.graph.pipeline import run_passes
from ktcompile.passes import passes_for
from ktcompile.runtime.executable import InnerCompiler, build
from ktcompile.runtime.placing import placer_for


def kt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: what ktcompile has kernels for runs on them, the rest as the option `inner` says.

    mode: a mode of Inductor, which then runs the rest. options: the fields of `ktcompile.config.CompileOptions`.
    ValueError: an option is unknown or cannot be used on this machine.
    """
    settings = CompileOptions.from_mapping(options)
    placer = placer_for(settings)
    inner = settings.inner
    if inner == "auto":
        inner = "inductor" if mode or placer is not None or needs_gradients(example_inputs) else "program"
    result = report.CompileReport(inner=inner)
    owners = ParameterOwners()
    gm = run_passes(_copy(gm), example_inputs, passes_for(settings, owners), result, settings.dump_graphs)
    compiled = build(gm, example_inputs, owners if settings.weights == "take" else None, _inner(inner, mode), placer)
    report.record(result)
    return compiled


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo reads the placeholders of its own graph again after the backend has returned."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy


def _inner(name: str, mode: str | None) -> InnerCompiler | str:
    if name != "inductor":
        return name

    def inductor(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode else None
        return compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[return-value]

    return inductor
