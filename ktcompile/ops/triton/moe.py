"""The experts of a layer that are in device memory.

Shape suffixes: T tokens, K top_k, H hidden_size, I intermediate_size, E experts, P pairs of token and slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktcompile.ops.spec import Activation
from ktcompile.ops.triton.kernels.moe import first_product_kernel, second_product_kernel, weighted_sum_kernel
from ktcompile.ops.triton.launch import Launch
from ktcompile.ops.triton.routing import Routing, route
from ktcompile.ops.triton.weights import DeviceWeight, device_weight
from ktcompile.quant import QuantizedWeight

# The tile is the same whatever the batch, and with it the instructions that sum a token's products and their order. Few
# rows then waste arithmetic, of which there is plenty where weights have to be read for few rows.
BLOCK_ROWS = 64
# The sum of a group is an accumulator besides that of the product. Threads have the registers for both where a tile has
# fewer columns, or more threads: see the choices that depend on `group_size`. int8 needs some to widen its codes.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceExperts:
    """The resident experts of a layer; `device_experts` makes it.

    gate_up: [S, 2I, H], or [S, I, H] if the activation is not gated. down: [S, H, I]. Biases: [S, 2I or I], [S, H].
    interleaved: rows of gate and up alternate, else all of gate come first.
    """

    gate_up: DeviceWeight
    down: DeviceWeight
    activation: Activation
    interleaved: bool
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def num_resident(self) -> int:
        return self.down.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]


def device_experts(
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    activation: Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    interleaved: bool = False,
    device: torch.device,
) -> DeviceExperts:
    """Return the resident experts, on `device`.

    gate_up: [S, 2I, H] (not gated: [S, I, H]). down: [S, H, I]. Weights that are stored the other way round are given
    as `weight.mT`. Biases have a row for each expert. ValueError: shapes do not fit, or see `device_weight`.
    """
    first = device_weight(gate_up, device, "gate_up")
    second = device_weight(down, device, "down")
    num_resident, hidden, intermediate = second.shape
    rows = intermediate * (2 if activation.gated else 1)
    if first.shape != (num_resident, rows, hidden):
        wanted = [num_resident, rows, hidden]
        raise ValueError(f"gate_up is {list(first.shape)}; with down {list(second.shape)} it must be {wanted}")
    biases = [
        _checked_bias(bias, (num_resident, size), what, device)
        for bias, size, what in ((gate_up_bias, rows, "gate_up_bias"), (down_bias, hidden, "down_bias"))
    ]
    return DeviceExperts(first, second, activation, interleaved, *biases)


def moe(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: DeviceExperts,
    resident_E: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the sum over slots with a resident expert of `weight * expert(x)`, [T, H], in `dtype` (None: that of x).

    x_TH: bf16, fp16 or fp32, which must hold plain weights' numbers. ids_TK: int32 or int64. weights_TK: floating.
    resident_E: int32, where each expert is among the resident ones, or -1; see `route`. The activation is rounded to
    the dtype of x, all else is fp32. The sum is in ascending order of slots, and the result of a token does not
    depend on the rest of the batch, nor on where an expert is, if the same of its experts are resident.
    ValueError: shapes, dtypes or devices do not fit.
    """
    products = Products(x_TH, ids_TK, weights_TK, experts, dtype)
    products.add(resident_E)
    return products.result()


class Products:
    """The products of a call, whose experts may be made known in several parts.

    Arguments and errors as of `moe`. The result is the same bits, in however many parts it comes.
    """

    def __init__(
        self,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        experts: DeviceExperts,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_inputs(x_TH, ids_TK, weights_TK, experts)
        self._x_TH, self._ids_TK, self._weights_TK = x_TH, ids_TK, weights_TK.contiguous()
        self._experts, self._dtype = experts, dtype or x_TH.dtype
        self._products_PH = x_TH.new_empty(ids_TK.numel(), x_TH.shape[1], dtype=torch.float32)
        self._routing: Routing | None = None

    def add(self, resident_E: Tensor) -> None:
        """Compute the products of the experts that have a place in `resident_E`; none has come before."""
        _check_resident(resident_E, self._x_TH.device)
        if not self._ids_TK.numel() or not self._experts.num_resident:
            return
        self._routing = route(self._ids_TK, resident_E, self._experts.num_resident, BLOCK_ROWS, self._routing)
        for launch in product_launches(self._x_TH, self._products_PH, self._experts, self._routing):
            launch.run()

    def result(self) -> Tensor:
        """Return the weighted sum over all that were added, [T, H]."""
        out_TH = torch.empty(self._x_TH.shape, dtype=self._dtype, device=self._x_TH.device)
        if self._routing is None:
            return out_TH.zero_()
        sum_launch(self._products_PH, self._weights_TK, self._routing.resident, out_TH).run()
        return out_TH


def product_launches(
    x_TH: Tensor, products_PH: Tensor, experts: DeviceExperts, routing: Routing
) -> tuple[Launch, Launch]:
    """Return the kernels of both products, to be run in order. Arguments as `Products` has checked them."""
    activated_PI = x_TH.new_empty(len(products_PH), experts.intermediate_size)
    return (
        _first_product(x_TH, activated_PI, experts, routing),
        _second_product(activated_PI, products_PH, experts, routing),
    )


def sum_launch(products_PH: Tensor, weights_TK: Tensor, resident_P: Tensor, out_TH: Tensor) -> Launch:
    """Return the kernel of the weighted sum. Arguments as `Products` has checked them."""
    columns, (tokens, hidden) = 1024, out_TH.shape
    return Launch(
        weighted_sum_kernel,
        (tokens, -(-hidden // columns)),
        (products_PH, weights_TK, resident_P, out_TH, weights_TK.shape[1], hidden),
        {"BLOCK_N": columns},
    )


def _first_product(x_TH: Tensor, activated_PI: Tensor, experts: DeviceExperts, routing: Routing) -> Launch:
    activation, weight = experts.activation, experts.gate_up
    columns = 32 if weight.format.group_size else 64
    sizes = (routing.top_k, x_TH.shape[1], experts.intermediate_size, x_TH.stride(0))
    constants = _constants(weight, experts.gate_up_bias, columns) | {
        "KIND": activation.kind,
        "GATED": activation.gated,
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
        "INTERLEAVED": experts.interleaved,
    }
    return Launch(
        first_product_kernel,
        (len(routing.blocks), -(-experts.intermediate_size // columns)),
        (x_TH, activated_PI, *_tensors(weight, experts.gate_up_bias, routing), *sizes, *_strides(weight)),
        constants,
    )


def _second_product(activated_PI: Tensor, products_PH: Tensor, experts: DeviceExperts, routing: Routing) -> Launch:
    weight, hidden, columns = experts.down, products_PH.shape[1], 128
    return Launch(
        second_product_kernel,
        (len(routing.blocks), -(-hidden // columns)),
        (
            activated_PI,
            products_PH,
            *_tensors(weight, experts.down_bias, routing),
            experts.intermediate_size,
            hidden,
            *_strides(weight),
        ),
        _constants(weight, experts.down_bias, columns),
        num_warps=8 if weight.format.group_size or weight.format.layout == "int8" else 4,
    )


def _tensors(weight: DeviceWeight, bias: Tensor | None, routing: Routing) -> tuple[Tensor, ...]:
    """Return what both products read. Kernels do not touch the pointers that stand for what there is not."""
    optional = (t if t is not None else weight.codes for t in (weight.scales, weight.zeros, bias))
    return weight.codes, *optional, routing.order, routing.blocks


def _strides(weight: DeviceWeight) -> tuple[int, int, int, int]:
    return *weight.strides, weight.scale_stride


def _constants(weight: DeviceWeight, bias: Tensor | None, block_columns: int) -> dict[str, Any]:
    return {
        "FORMAT": weight.kernel_format,
        "GROUP": weight.format.group_size or 0,
        "HAS_ZEROS": weight.zeros is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": BLOCK_ROWS,
        "BLOCK_N": block_columns,
    }


def _checked_bias(bias: Tensor | None, shape: tuple[int, int], what: str, device: torch.device) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != shape or not bias.is_floating_point():
        raise ValueError(f"{what} is {list(bias.shape)} of {bias.dtype}; it must be {list(shape)} and floating")
    return bias.detach().to(device).contiguous()


def _check_inputs(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: DeviceExperts) -> None:
    hidden = experts.down.shape[1]
    if x_TH.dim() != 2 or x_TH.shape[1] != hidden or x_TH.dtype not in _DTYPES:
        allowed = ", ".join(str(d) for d in _DTYPES)
        raise ValueError(f"x is {list(x_TH.shape)} of {x_TH.dtype}; it must be [tokens, {hidden}] of {allowed}")
    if x_TH.stride(1) != 1:
        raise ValueError(f"x has strides {x_TH.stride()}; its rows must be contiguous")
    if ids_TK.dim() != 2 or ids_TK.shape[0] != x_TH.shape[0] or ids_TK.dtype not in (torch.int32, torch.int64):
        found = f"{list(ids_TK.shape)} of {ids_TK.dtype}"
        raise ValueError(f"topk_ids is {found}; it must be [{x_TH.shape[0]}, top_k] of int32 or int64")
    if weights_TK.shape != ids_TK.shape or not weights_TK.is_floating_point():
        found = f"{list(weights_TK.shape)} of {weights_TK.dtype}"
        raise ValueError(f"topk_weights is {found}; it must be {list(ids_TK.shape)} and floating")
    for weight, what in ((experts.gate_up, "gate_up"), (experts.down, "down")):
        stored = x_TH.dtype if weight.scales is not None else weight.codes.dtype
        if stored != x_TH.dtype and torch.promote_types(stored, x_TH.dtype) != x_TH.dtype:
            raise ValueError(f"x is {x_TH.dtype}, which does not hold the numbers of {what}, {weight.codes.dtype}")
    _check_one_device(x_TH, ids_TK, weights_TK, experts.down.codes)


def _check_resident(resident_E: Tensor, device: torch.device) -> None:
    if resident_E.dim() != 1 or resident_E.dtype != torch.int32:
        raise ValueError(f"resident is {list(resident_E.shape)} of {resident_E.dtype}; it must be [experts] of int32")
    if resident_E.device != device:
        raise ValueError(f"resident is on {resident_E.device}; it must be on {device}, as x")


def _check_one_device(*tensors: Tensor) -> None:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"the arguments are on {', '.join(sorted(map(str, devices)))}; all must be on one device")
