"""ktcompile: Mixture-of-Experts models on ordinary machines.

`torch.compile(model, backend="kt")` needs no import of this package. Importing it registers the experts implementation
and the attention implementation "kt" with transformers.
"""

from importlib.metadata import version

from ktcompile import ops
from ktcompile.graph.report import CompileReport, compile_reports
from ktcompile.models import hf_attention, hf_experts
from ktcompile.ops import get_num_threads, set_num_threads

__version__ = version("ktcompile")
__all__ = ["CompileReport", "compile_reports", "get_num_threads", "ops", "set_num_threads"]

hf_experts.register()
hf_attention.register()
