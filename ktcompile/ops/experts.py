"""Packing of experts: from plain or quantised tensors to the kernels' layout, and back.

Shape suffixes: E experts, H hidden_size, I intermediate_size.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from ktcompile import _native, env
from ktcompile.machine import check_isa, machine
from ktcompile.ops.self_check import FirstCall, PackingCheck
from ktcompile.ops.spec import Activation, ExpertsSpec
from ktcompile.ops.threads import get_num_threads
from ktcompile.ops.weights import (
    ExpertsWeight,
    MappedLayer,
    StoredWeight,
    Weight,
    format_of,
    native_format,
    quantized_address,
)
from ktcompile.quant import QuantizedWeight, WeightFormat, native_dtype

if TYPE_CHECKING:
    from ktcompile.ops.split import SplitLayer

_numbers = itertools.count(1)
# Bytes of experts' weights that threads have in memory while they pack them from files.
_READ_AT_ONCE = 1 << 29
_alive: weakref.WeakValueDictionary[int, PackedExperts] = weakref.WeakValueDictionary()


class PackedExperts:
    """The experts of one layer in the kernels' layout.

    num_experts, hidden_size, intermediate_size: of the layer. format: how weights are stored. isa: whose
    kernels run. nbytes: memory that it holds. handle: int64 [1], what stands for it in graphs of `kt::moe`.
    number: of this layer, in the order of packing. name: of the module, for messages; "" is looked up when one is
    needed. first_call: what checks the first call, None once it has. split: where those of its experts are that a
    device has, None while all are the CPU's.
    """

    def __init__(
        self,
        gate_up_proj: ExpertsWeight,
        down_proj: ExpertsWeight,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        spec: ExpertsSpec,
        name: str = "",
    ) -> None:
        shape = _check_weights(gate_up_proj, down_proj, gate_up_bias, down_bias, spec)
        weight_format = _format_of(gate_up_proj, down_proj, spec)
        quantized = (w for w in (gate_up_proj, down_proj) if isinstance(w, QuantizedWeight))
        self._begin(shape, weight_format, native_format(weight_format, *quantized), spec, name)
        checks = env.read().self_check
        self._pack(gate_up_proj, down_proj, PackingCheck(self, gate_up_proj, down_proj) if checks else None)
        if gate_up_bias is not None and down_bias is not None:
            self._pack_bias(gate_up_bias, down_bias)
        self.first_call = FirstCall(gate_up_proj, (gate_up_bias, down_bias)) if checks else None

    @classmethod
    def mapped(
        cls, memory: MappedLayer, biases: Sequence[torch.Tensor | None], spec: ExpertsSpec, name: str = ""
    ) -> PackedExperts:
        """Return experts whose weights, and packed biases, lie packed in a file.

        biases: as they were packed, for the check of the first call. Where there are several nodes of memory each gets
        a copy of its slice, since pages of a file lie on any of them. ValueError: the memory is not of such experts.
        """
        self = cls.__new__(cls)
        self._begin(memory.shape, memory.format, memory.native_format, spec, name)
        mapped = self.native
        mapped.map(memory.places, memory.owner)
        if len(mapped.slices) > 1:
            self.native = self._allocate()
            self._each_expert(lambda e: self.native.copy(e, mapped, e), range(self.num_experts))
        self.first_call = FirstCall(None, biases) if env.read().self_check else None
        return self

    def _begin(
        self,
        shape: tuple[int, int, int],
        weight_format: WeightFormat,
        native: _native.Format,
        spec: ExpertsSpec,
        name: str,
    ) -> None:
        self.spec, self.name, self.number = spec, name, next(_numbers)
        self.num_experts, self.hidden_size, self.intermediate_size = shape
        self.format, self._native_format = weight_format, native
        self.isa = check_isa(spec.isa, machine().isas) if spec.isa else machine().isa
        self.native = self._allocate()
        self.split: SplitLayer | None = None
        self.handle = torch.tensor([self.number], dtype=torch.int64)
        _alive[self.number] = self

    @property
    def nbytes(self) -> int:
        return self.native.nbytes

    @property
    def label(self) -> str:
        """What the layer is called in messages."""
        return self.name or f"experts {self.number} in the order of packing"

    def empty(self) -> PackedExperts:
        """Return experts of the same number, shape and format that hold nothing yet, for which no handle stands."""
        other = copy.copy(self)
        other.native, other.first_call, other.split = self._allocate(), None, None
        return other

    def unpack_into(self, *weights: torch.Tensor) -> None:
        """Write gate_up_proj and down_proj, dequantised, into tensors of the shapes that they were packed from."""
        gate_up_proj, down_proj = weights
        _check_weights(gate_up_proj, down_proj, None, None, self.spec)
        places = self._places(gate_up_proj, down_proj)
        self._bring_back(*range(self.num_experts))
        self._each_expert(lambda e: self.native.unpack(e, *places), range(self.num_experts))

    def unpack(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gate_up_proj [2I, H], or [I, H], and down_proj [H, I] of one expert as they are stored, in fp32 if the
        format has scales."""
        self._bring_back(expert)
        rows = self.intermediate_size * (2 if self.spec.activation.gated else 1)
        shapes = ((rows, self.hidden_size), (self.hidden_size, self.intermediate_size))
        dtype = self.format.storage or torch.float32
        gate_up, down = (torch.empty(shape, dtype=dtype, device="cpu") for shape in shapes)
        places = (gate_up.data_ptr(), (0, *gate_up.stride()), down.data_ptr(), (0, *down.stride()))
        self.native.unpack(expert, *places, native_dtype(dtype, "the weight"))  # type: ignore[arg-type]
        return gate_up, down

    def _bring_back(self, *experts: int) -> None:
        if self.split is not None:
            for expert in experts:
                self.split.fetch(expert)

    def _allocate(self) -> _native.Experts:
        activation = self.spec.activation
        return _native.Experts(
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            self._native_format,
            activation.native,
            activation.gated,
            self.spec.interleaved,
            activation.alpha,
            activation.limit,
            _native.numa_nodes(),
        )

    def _pack(self, gate_up: ExpertsWeight, down: ExpertsWeight, check: PackingCheck | None) -> None:
        pack = self._packing(gate_up, down)

        def work(expert: int) -> None:
            pack(expert)
            if check is not None:
                check(expert)

        order = check.order() if check else range(self.num_experts)
        self._each_expert(work, order, _readers(gate_up, down))

    def _packing(self, gate_up: ExpertsWeight, down: ExpertsWeight) -> Callable[[int], None]:
        """Return what packs one expert."""
        if isinstance(gate_up, QuantizedWeight) and isinstance(down, QuantizedWeight):
            places = quantized_address(gate_up), quantized_address(down)
            return lambda e: self.native.pack_quantized(e, *places)
        assert not isinstance(gate_up, QuantizedWeight) and not isinstance(down, QuantizedWeight)
        pack = self._store if self.format.codec is None else self._quantize
        return lambda e: pack(e, self._of_expert(gate_up, e), self._of_expert(down, e))

    def _of_expert(self, weight: torch.Tensor | StoredWeight, expert: int) -> torch.Tensor:
        """Return the weight of one expert, [out, in]."""
        if isinstance(weight, StoredWeight):
            return weight.read(expert)
        return weight[expert].mT if self.spec.transposed else weight[expert]

    def _store(self, expert: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        places = (gate_up.data_ptr(), (0, *gate_up.stride()), down.data_ptr(), (0, *down.stride()))
        self.native.pack(expert, *places, native_dtype(gate_up.dtype, "gate_up_proj"))  # type: ignore[arg-type]

    def _quantize(self, expert: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        names = (f"gate_up_proj of expert {expert}", f"down_proj of expert {expert}")
        codes = [self.format.quantize(weight, name) for name, weight in zip(names, (gate_up, down), strict=True)]
        self.native.pack_quantized(expert, *(quantized_address(c) for c in codes))

    def _places(
        self, gate_up: torch.Tensor, down: torch.Tensor
    ) -> tuple[int, tuple[int, int, int], int, tuple[int, int, int], _native.DType]:
        """Return what the native functions take: addresses, strides of (expert, out, in), dtype."""
        out, into = (2, 1) if self.spec.transposed else (1, 2)
        strides = [(t.stride(0), t.stride(out), t.stride(into)) for t in (gate_up, down)]
        dtype = native_dtype(gate_up.dtype, "gate_up_proj")
        return gate_up.data_ptr(), strides[0], down.data_ptr(), strides[1], dtype

    def _each_expert(self, work: Callable[[int], None], order: Sequence[int], most_at_once: int | None = None) -> None:
        threads = get_num_threads()
        with ThreadPoolExecutor(threads if most_at_once is None else min(threads, most_at_once)) as pool:
            list(pool.map(work, order))

    def _pack_bias(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        dtype = native_dtype(gate_up.dtype, "gate_up_bias")
        places = (gate_up.data_ptr(), gate_up.stride(), down.data_ptr(), down.stride())
        self.native.pack_bias(*places, dtype)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return (
            f"PackedExperts({self.num_experts} experts, hidden {self.hidden_size}, intermediate "
            f"{self.intermediate_size}, {self.format.name}, {self.isa}, {self.nbytes / 2**20:.1f} MiB)"
        )


def pack_experts(
    gate_up_proj: Weight,
    down_proj: Weight,
    weight_format: str = "auto",
    activation: str | Activation = "silu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    isa: str | None = None,
    *,
    interleaved: bool = False,
    transposed: bool = False,
    name: str = "",
) -> PackedExperts:
    """Return the experts of one MoE layer, packed for `ktcompile.ops.moe`.

    gate_up_proj: [E, 2I, H] ([E, H, 2I] if transposed), gate first then up, or alternating if interleaved;
        [E, I, H] for an activation that is not gated.
    down_proj: [E, H, I] ([E, I, H] if transposed).
        A `ktcompile.quant.QuantizedWeight` of these shapes, not transposed, is packed as it is.
    weight_format: "auto" keeps the dtype or the format of the source; else a name of `ktcompile.quant.FORMATS`.
    activation: a name, or an `Activation` with its parameters.
    gate_up_bias, down_bias: [E, 2I] in the order of gate_up_proj, and [E, H]; both or none.
    isa: instruction set of the kernels; None is the best of this machine. name: of the layer, for messages.
    The tensors are read, not kept. ValueError: a shape, dtype, format, activation or ISA cannot be used.
    SelfCheckError: what was packed is not what was given.
    """
    act = Activation(activation) if isinstance(activation, str) else activation
    spec = ExpertsSpec(act, interleaved, transposed, weight_format, isa)
    return PackedExperts(gate_up_proj, down_proj, gate_up_bias, down_bias, spec, name)


def token_counts(layers: Sequence[Sequence[PackedExperts]]) -> list[list[int]]:
    """Return how many tokens each expert of each layer was given, since it was packed. layers: the forms of each."""
    return [
        [sum(of_one) for of_one in zip(*(f.native.tokens for f in layer), strict=True)] for layer in layers if layer
    ]


def formats(layers: Sequence[Sequence[PackedExperts]]) -> list[str]:
    """Return the names of the formats that layers are packed in, in their order. layers: the forms of each."""
    return list(dict.fromkeys(form.format.name for layer in layers for form in layer))


def from_handle(handle: torch.Tensor) -> PackedExperts:
    """Return the packed experts that `handle` stands for. ValueError: there are none (any more)."""
    experts = _alive.get(int(handle))
    if experts is None:
        raise ValueError(f"no packed experts have the handle {int(handle)}; were they freed?")
    return experts


def _readers(gate_up: ExpertsWeight, down: ExpertsWeight) -> int | None:
    """Return how many threads may read experts at once; None: nothing is read."""
    read = [w.shape[1] * w.shape[2] * w.dtype.itemsize for w in (gate_up, down) if isinstance(w, StoredWeight)]
    return max(1, _READ_AT_ONCE // sum(read)) if read else None


def _format_of(gate_up: ExpertsWeight, down: ExpertsWeight, spec: ExpertsSpec) -> WeightFormat:
    formats = [w.format.name if isinstance(w, QuantizedWeight) else str(w.dtype) for w in (gate_up, down)]
    if formats[0] != formats[1]:
        raise ValueError(f"gate_up_proj is {formats[0]} and down_proj is {formats[1]}; they must be of one format")
    return format_of(gate_up, spec.weight_format, "the weights are")


def _check_weights(
    gate_up: ExpertsWeight,
    down: ExpertsWeight,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    spec: ExpertsSpec,
) -> tuple[int, int, int]:
    """Return (E, H, I). ValueError: the tensors do not fit together."""
    shapes = f"gate_up_proj {list(gate_up.shape)} and down_proj {list(down.shape)}"
    if len(gate_up.shape) != 3 or len(down.shape) != 3:
        raise ValueError(f"{shapes}: both must have three dimensions (expert, out, in)")
    if spec.transposed and not (isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor)):
        raise ValueError(
            "weights that are quantised, or read from files, are [expert, out, in]; they cannot be transposed"
        )
    out, into = (2, 1) if spec.transposed else (1, 2)
    num_experts, hidden, intermediate = down.shape[0], down.shape[out], down.shape[into]
    rows = 2 * intermediate if spec.activation.gated else intermediate
    expected = (num_experts, hidden, rows) if spec.transposed else (num_experts, rows, hidden)
    if tuple(gate_up.shape) != expected:
        raise ValueError(f"{shapes} do not fit: gate_up_proj must be {list(expected)} for {spec}")
    if min(down.shape) == 0:
        raise ValueError(f"{shapes}: no dimension may be 0")
    if (gate_up_bias is None) != (down_bias is None):
        raise ValueError("gate_up_bias and down_bias must both be given, or neither")
    tensors = {n: w for n, w in (("gate_up_proj", gate_up), ("down_proj", down)) if isinstance(w, torch.Tensor)}
    if gate_up_bias is not None and down_bias is not None:
        for name, bias, width in (("gate_up_bias", gate_up_bias, rows), ("down_bias", down_bias, hidden)):
            if tuple(bias.shape) != (num_experts, width):
                raise ValueError(f"{name} is {list(bias.shape)}; it must be {[num_experts, width]}")
            tensors[name] = bias
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; it must be on the CPU to be packed")
        native_dtype(tensor.dtype, name)
    for a, b in (("gate_up_proj", "down_proj"), ("gate_up_bias", "down_bias")):
        if a in tensors and b in tensors and tensors[a].dtype != tensors[b].dtype:
            raise ValueError(f"{a} is {tensors[a].dtype} and {b} is {tensors[b].dtype}; they must be the same")
    return num_experts, hidden, intermediate
