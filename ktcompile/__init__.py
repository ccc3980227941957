"""ktcompile: Mixture-of-Experts models on ordinary machines.

`torch.compile(model, backend="kt")` needs no import of this package. Importing it has the implementations "kt" of
experts and of attention registered with transformers, as soon as that can run models.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from ktcompile import collector, openmp, ops  # noqa: F401  (openmp first: it loads torch)
from ktcompile.graph.report import CompileReport, compile_reports
from ktcompile.models import registration
from ktcompile.ops import get_num_threads, set_num_threads

if TYPE_CHECKING:
    from ktcompile.engine.llm import LLM
    from ktcompile.engine.outputs import CompletionOutput, RequestOutput
    from ktcompile.engine.sampling_params import SamplingParams, StructuredOutputsParams
    from ktcompile.models.load import load
    from ktcompile.models.placed import expert_metrics

__version__ = version("ktcompile")
__all__ = [
    "LLM",
    "CompileReport",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "compile_reports",
    "expert_metrics",
    "get_num_threads",
    "load",
    "ops",
    "set_num_threads",
]

# Imported when they are first asked for, since most programs that compile a model need none of them.
_LAZY = {
    "LLM": "ktcompile.engine.llm",
    "CompletionOutput": "ktcompile.engine.outputs",
    "RequestOutput": "ktcompile.engine.outputs",
    "SamplingParams": "ktcompile.engine.sampling_params",
    "StructuredOutputsParams": "ktcompile.engine.sampling_params",
    "expert_metrics": "ktcompile.models.placed",
    "load": "ktcompile.models.load",
}

registration.register()


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ktcompile' has no attribute {name!r}")
    with collector.paused():
        module = importlib.import_module(_LAZY[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
