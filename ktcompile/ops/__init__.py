"""The operators of ktcompile, in the torch.library namespace "kt"."""

from ktcompile.ops.experts import PackedExperts, pack_experts
from ktcompile.ops.moe import moe
from ktcompile.ops.spec import Activation, ExpertsSpec
from ktcompile.ops.threads import get_num_threads, set_num_threads

__all__ = [
    "Activation",
    "ExpertsSpec",
    "PackedExperts",
    "get_num_threads",
    "moe",
    "pack_experts",
    "set_num_threads",
]
