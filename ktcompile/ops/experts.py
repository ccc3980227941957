"""Packing of experts: from plain tensors to the kernels' layout, and back.

Shape suffixes: E experts, H hidden_size, I intermediate_size.
"""

from __future__ import annotations

import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from ktcompile import _native
from ktcompile.machine import check_isa, machine
from ktcompile.ops.spec import Activation, ExpertsSpec
from ktcompile.ops.threads import get_num_threads
from ktcompile.quant import WeightFormat, native_dtype, resolve_format

_numbers = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, PackedExperts] = weakref.WeakValueDictionary()


class PackedExperts:
    """The experts of one layer in the kernels' layout.

    num_experts, hidden_size, intermediate_size: of the layer. format: how weights are stored. isa: whose
    kernels run. nbytes: memory that it holds. handle: int64 [1], what stands for it in graphs of `kt::moe`.
    """

    def __init__(
        self,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        spec: ExpertsSpec,
    ) -> None:
        shape = _check_weights(gate_up_proj, down_proj, gate_up_bias, down_bias, spec)
        self.spec = spec
        self.num_experts, self.hidden_size, self.intermediate_size = shape
        self.format: WeightFormat = resolve_format(spec.weight_format, gate_up_proj.dtype)
        self.isa = check_isa(spec.isa, machine().isas) if spec.isa else machine().isa
        self.native = _native.Experts(
            *shape,
            self.format.native,
            spec.activation.native,
            spec.activation.gated,
            spec.interleaved,
            spec.activation.alpha,
            spec.activation.limit,
        )
        self._each_expert(self.native.pack, gate_up_proj, down_proj)
        if gate_up_bias is not None and down_bias is not None:
            self._pack_bias(gate_up_bias, down_bias)
        number = next(_numbers)
        self.handle = torch.tensor([number], dtype=torch.int64)
        _alive[number] = self

    @property
    def nbytes(self) -> int:
        return self.native.nbytes

    def unpack_into(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> None:
        """Write the weights into tensors of the shapes that they were packed from."""
        _check_weights(gate_up_proj, down_proj, None, None, self.spec)
        self._each_expert(self.native.unpack, gate_up_proj, down_proj)

    def _each_expert(self, work: object, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        dtype = native_dtype(gate_up.dtype, "gate_up_proj")
        # Native strides are (expert, out, in).
        order = (0, 2, 1) if self.spec.transposed else (0, 1, 2)
        gate_up_strides, down_strides = (tuple(t.stride(i) for i in order) for t in (gate_up, down))

        def one(expert: int) -> None:
            work(expert, gate_up.data_ptr(), gate_up_strides, down.data_ptr(), down_strides, dtype)  # type: ignore[operator]

        with ThreadPoolExecutor(get_num_threads()) as pool:
            list(pool.map(one, range(self.num_experts)))

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
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    weight_format: str = "auto",
    activation: str | Activation = "silu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    isa: str | None = None,
    *,
    interleaved: bool = False,
    transposed: bool = False,
) -> PackedExperts:
    """Return the experts of one MoE layer, packed for `ktcompile.ops.moe`.

    gate_up_proj: [E, 2I, H] ([E, H, 2I] if transposed), gate first then up, or alternating if interleaved;
        [E, I, H] for an activation that is not gated.
    down_proj: [E, H, I] ([E, I, H] if transposed).
    weight_format: "auto" keeps the dtype of the source; else fp32, fp16 or bf16.
    activation: a name, or an `Activation` with its parameters.
    gate_up_bias, down_bias: [E, 2I] in the order of gate_up_proj, and [E, H]; both or none.
    isa: instruction set of the kernels; None is the best of this machine.
    The tensors are read, not kept. ValueError: a shape, dtype, format, activation or ISA cannot be used.
    """
    act = Activation(activation) if isinstance(activation, str) else activation
    spec = ExpertsSpec(act, interleaved, transposed, weight_format, isa)
    return PackedExperts(gate_up_proj, down_proj, gate_up_bias, down_bias, spec)


def from_handle(handle: torch.Tensor) -> PackedExperts:
    """Return the packed experts that `handle` stands for. ValueError: there are none (any more)."""
    experts = _alive.get(int(handle))
    if experts is None:
        raise ValueError(f"no packed experts have the handle {int(handle)}; were they freed?")
    return experts


def _check_weights(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    spec: ExpertsSpec,
) -> tuple[int, int, int]:
    """Return (E, H, I). ValueError: the tensors do not fit together."""
    shapes = f"gate_up_proj {list(gate_up.shape)} and down_proj {list(down.shape)}"
    if gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(f"{shapes}: both must have three dimensions (expert, out, in)")
    out, into = (2, 1) if spec.transposed else (1, 2)
    num_experts, hidden, intermediate = down.shape[0], down.shape[out], down.shape[into]
    rows = 2 * intermediate if spec.activation.gated else intermediate
    expected = (num_experts, hidden, rows) if spec.transposed else (num_experts, rows, hidden)
    if tuple(gate_up.shape) != expected:
        raise ValueError(f"{shapes} do not fit: gate_up_proj must be {list(expected)} for {spec}")
    if min(down.shape) == 0:
        raise ValueError(f"{shapes}: no dimension may be 0")
    tensors = {"gate_up_proj": gate_up, "down_proj": down}
    if (gate_up_bias is None) != (down_bias is None):
        raise ValueError("gate_up_bias and down_bias must both be given, or neither")
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
        if a in tensors and tensors[a].dtype != tensors[b].dtype:
            raise ValueError(f"{a} is {tensors[a].dtype} and {b} is {tensors[b].dtype}; they must be the same")
    return num_experts, hidden, intermediate
