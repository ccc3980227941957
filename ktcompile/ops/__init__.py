"""The operators of ktcompile, in the torch.library namespace "kt"."""

import ktcompile.ops.cached_attention
import ktcompile.ops.split  # noqa: F401  (their operators)
from ktcompile.ops.attention import attention, paged_attention
from ktcompile.ops.experts import PackedExperts, pack_experts
from ktcompile.ops.kv import KV_FORMATS, KVFormat, PagedKV, store_kv
from ktcompile.ops.linear import PackedLinear, linear, pack_linear
from ktcompile.ops.moe import moe
from ktcompile.ops.norm import add_rms_norm, rms_norm
from ktcompile.ops.rotary import rotary
from ktcompile.ops.self_check import SelfCheckError
from ktcompile.ops.spec import Activation, ExpertsSpec
from ktcompile.ops.threads import get_num_threads, set_num_threads

__all__ = [
    "KV_FORMATS",
    "Activation",
    "ExpertsSpec",
    "KVFormat",
    "PackedExperts",
    "PackedLinear",
    "PagedKV",
    "SelfCheckError",
    "add_rms_norm",
    "attention",
    "get_num_threads",
    "linear",
    "moe",
    "pack_experts",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rotary",
    "set_num_threads",
    "store_kv",
]
