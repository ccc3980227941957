"""Linear layers: packed weights and the operators `kt::linear` and `kt::head_linear`.

Shape suffixes: R rows, H heads, N out_features, K in_features.
"""

from __future__ import annotations

import itertools
import math
import weakref

import torch

from ktcompile import _native
from ktcompile.machine import check_isa, machine
from ktcompile.ops.library import LIBRARY, register_without_backward
from ktcompile.ops.threads import native_threads
from ktcompile.ops.weights import MappedLayer, Weight, format_of, native_format, quantized_address
from ktcompile.quant import native_dtype

_numbers = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()

for _name in ("linear", "head_linear"):
    LIBRARY.define(
        f"{_name}(Tensor x, Tensor weight, SymInt out_features) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )


class PackedLinear:
    """The weight of a linear layer in the kernels' layout, or those of one layer for each head.

    weight: [N, K], or of heads a tensor [H, N, K]. out_features, in_features: of the layer, or of a head. heads: 1
    where there are none. format: how weights are stored. isa: whose kernels run. nbytes: memory that it holds. handle:
    int64 [1], what stands for it in graphs of `kt::linear` or `kt::head_linear`.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None, weight_format: str, isa: str | None) -> None:
        self.heads, self.out_features, self.in_features = _check_weight(weight, bias)
        self.isa = check_isa(isa, machine().isas) if isa else machine().isa
        self.format = format_of(weight, weight_format, "the weight is")
        parts: list[Weight] = [weight]
        if isinstance(weight, torch.Tensor) and weight.dim() == 3:
            parts = list(weight)
        if self.format.codec is not None:
            parts = [self.format.quantize(p, "weight") if isinstance(p, torch.Tensor) else p for p in parts]
        quantized = [p for p in parts if not isinstance(p, torch.Tensor)]
        self.native = _native.Linear(
            native_format(self.format, *quantized), self.out_features, self.in_features, self.heads
        )
        for head, part in enumerate(parts):
            if isinstance(part, torch.Tensor):
                strides = (part.stride(0), part.stride(1))
                self.native.pack(part.data_ptr(), strides, native_dtype(part.dtype, "weight"), head)
            else:
                self.native.pack_quantized(quantized_address(part), head)
        if bias is not None:
            self.native.pack_bias(bias.data_ptr(), bias.stride(0), native_dtype(bias.dtype, "bias"))
        self._begin()

    @classmethod
    def mapped(cls, memory: MappedLayer) -> PackedLinear:
        """Return a layer whose weight and bias lie packed in a file. ValueError: the memory is not of such a layer."""
        self = cls.__new__(cls)
        self.heads, self.out_features, self.in_features = memory.shape
        self.isa, self.format = machine().isa, memory.format
        self.native = _native.Linear(memory.native_format, self.out_features, self.in_features, self.heads)
        self.native.map(memory.places, memory.owner)
        self._begin()
        return self

    def _begin(self) -> None:
        number = next(_numbers)
        self.handle = torch.tensor([number], dtype=torch.int64)
        _alive[number] = self

    @property
    def nbytes(self) -> int:
        return self.native.nbytes

    def unpack_into(self, *weights: torch.Tensor) -> None:
        """Write the weight, dequantised, into tensors [N', K] that are its rows one after the other."""
        begin = 0
        weight_NK = self.unpack()
        for part in weights:
            part.copy_(weight_NK[begin : begin + len(part)])
            begin += len(part)

    def unpack(self) -> torch.Tensor:
        """Return the weight, dequantised, [N, K] in fp32, those of heads one after the other."""
        weight_HNK = torch.empty(self.heads, self.out_features, self.in_features)
        for head, weight_NK in enumerate(weight_HNK):
            self.native.unpack(weight_NK.data_ptr(), weight_NK.stride(), _native.DType.f32, head)
        return weight_HNK.flatten(0, 1)

    def __repr__(self) -> str:
        return (
            f"PackedLinear({self.in_features} to {self.out_features}, {self.format.name}, {self.isa}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )


def pack_linear(
    weight: Weight, bias: torch.Tensor | None = None, weight_format: str = "auto", isa: str | None = None
) -> PackedLinear:
    """Return the weight of a linear layer, packed for `ktcompile.ops.linear`.

    weight: [N, K], a tensor, or a `ktcompile.quant.QuantizedWeight` that is packed as it is. bias: [N].
    weight_format: "auto" keeps the dtype or the format of the source; else a name of `ktcompile.quant.FORMATS`.
    isa: instruction set of the kernels; None is the best of this machine.
    The tensors are read, not kept. ValueError: a shape, dtype, format or ISA cannot be used.
    """
    return PackedLinear(weight, bias, weight_format, isa)


def linear(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """Return x @ weight.T + bias, [..., N] in the dtype of `x`.

    x: [..., K], fp32, fp16 or bf16. Each row depends on that row of `x` alone, bit for bit, whatever the other rows
    and the number of threads. ValueError: a shape or dtype cannot be used.
    """
    result: torch.Tensor = torch.ops.kt.linear(x, packed.handle, packed.out_features)
    return result


@torch.library.impl(LIBRARY, "linear", "CPU")
def _linear_cpu(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return run(x, _of_handle(handle))


@torch.library.impl(LIBRARY, "head_linear", "CPU")
def _head_linear_cpu(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return run_heads(x, _of_handle(handle))


def run(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """Run the native kernels. As `linear`, which goes through torch's dispatcher."""
    *leading, in_features = x.shape or (0,)
    if in_features != packed.in_features:
        raise ValueError(f"x is {list(x.shape)}; its last dimension must be {packed.in_features}")
    dtype = native_dtype(x.dtype, "x")
    rows, stride = math.prod(leading), in_features
    if not x.is_contiguous():
        x = x.reshape(rows, in_features)
        if x.stride(1) != 1:
            x = x.contiguous()
        stride = x.stride(0)
    out = torch.empty(*leading, packed.out_features, dtype=x.dtype)
    places = (x.data_ptr(), stride, 0), (out.data_ptr(), packed.out_features, 0)
    native_threads().context().linear(packed.native, packed.isa, rows, dtype, *places)
    return out


def run_heads(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """Return the layers of heads, x[..., h, :] @ weight[h].T for each, [..., H, N] in the dtype of `x`.

    x: [..., H, K], fp32, fp16 or bf16. As of `linear`, rows depend on themselves alone. ValueError: as there.
    """
    *leading, heads, in_features = x.shape if x.dim() > 1 else (0, 0)
    if (heads, in_features) != (packed.heads, packed.in_features):
        wanted = [packed.heads, packed.in_features]
        raise ValueError(f"x is {list(x.shape)}; its last dimensions must be {wanted}")
    dtype = native_dtype(x.dtype, "x")
    rows = math.prod(leading)
    x_RHK = x.reshape(rows, heads, in_features)
    if x_RHK.stride(2) != 1:
        x_RHK = x_RHK.contiguous()
    out_RHN = torch.empty(rows, heads, packed.out_features, dtype=x.dtype)
    places = ((y.data_ptr(), y.stride(0), y.stride(1)) for y in (x_RHK, out_RHN))
    native_threads().context().linear(packed.native, packed.isa, rows, dtype, *places)
    return out_RHN.view(*leading, heads, packed.out_features)


@torch.library.register_fake("kt::linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("kt::head_linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


for _name in ("linear", "head_linear"):
    register_without_backward(_name)


def _of_handle(handle: torch.Tensor) -> PackedLinear:
    packed = _alive.get(int(handle))
    if packed is None:
        raise ValueError(f"no packed linear layer has the handle {int(handle)}; was it freed?")
    return packed


def _check_weight(weight: Weight, bias: torch.Tensor | None) -> tuple[int, int, int]:
    """Return (H, N, K), H of a weight without heads being 1. ValueError: the tensors cannot be packed."""
    of_heads = isinstance(weight, torch.Tensor) and len(weight.shape) == 3 and bias is None
    if not (of_heads or len(weight.shape) == 2) or min(weight.shape) == 0:
        raise ValueError(f"weight is {list(weight.shape)}; it must be [out_features, in_features], neither 0")
    tensors = {"weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} is on {tensor.device}; it must be on the CPU to be packed")
            native_dtype(tensor.dtype, name)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias is {list(bias.shape)}; it must be [{weight.shape[0]}]")
    heads = weight.shape[0] if of_heads else 1
    return heads, weight.shape[-2], weight.shape[-1]
