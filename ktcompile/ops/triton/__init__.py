"""Kernels for GPUs, in Triton. Nothing else in ktcompile imports this package unless a GPU is to be used."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("ktcompile.ops.triton needs Triton; install it with: pip install 'ktcompile[gpu]'") from error

from ktcompile.ops.triton.attention import BlockCache, decode_attention, prefill_attention
from ktcompile.ops.triton.kv import Rotary, store_kv
from ktcompile.ops.triton.moe import DeviceExperts, Products, device_experts, moe
from ktcompile.ops.triton.routing import Routing, route
from ktcompile.ops.triton.weights import DeviceWeight, device_weight, empty_weight

__all__ = [
    "BlockCache",
    "DeviceExperts",
    "DeviceWeight",
    "Products",
    "Rotary",
    "Routing",
    "decode_attention",
    "device_experts",
    "device_weight",
    "empty_weight",
    "moe",
    "prefill_attention",
    "route",
    "store_kv",
]
