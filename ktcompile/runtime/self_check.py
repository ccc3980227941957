"""Checks every kernel that runs on this machine against the plain definition, on a small awkward shape.

Shape suffixes: T tokens, K top_k, H hidden_size, I intermediate_size, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ktcompile.machine import machine
from ktcompile.ops import Activation, ExpertsSpec, PackedExperts, moe, pack_experts, reference
from ktcompile.quant import FORMATS, WeightFormat

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 72, 56, 5, 3
TOKENS = (1, 7, 40)

_GATED = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2")
ACTIVATIONS = (
    *(Activation(kind) for kind in _GATED),
    Activation("silu", limit=0.5),
    Activation("swigluoai", alpha=1.702, limit=0.7),
    *(Activation(kind, gated=False) for kind in _GATED),
)
# One format for each way to multiply and store activated rows: fp32, bf16, int8, and int8 in groups.
_ROW_KINDS = ("fp32", "bf16", "int8_dyn", "int4_g32_dyn")
QUICK_ACTIVATIONS = (Activation("silu"), Activation("swigluoai", alpha=1.702, limit=0.7))

# A code of a dynamic format may round to its neighbour for a last bit in the rows.
_CODE_STEP = 1e-2
# By the dtype of the hidden states: it decides how outputs are rounded, and how intermediates may be.
_BUDGETS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """What one kernel computed.

    dtype: of the hidden states. error: relative Frobenius error against fp64, the worst over token counts;
    NaN or inf where the kernel gave such values. budget: the error that is allowed. rows_equal: whether the first,
    middle and last row of each batch had the same bits when computed alone. failure: what the kernel raised, or "".
    """

    isa: str
    weight_format: str
    dtype: str
    activation: str
    error: float
    budget: float
    rows_equal: bool
    failure: str = ""

    @property
    def ok(self) -> bool:
        # A NaN compares as false.
        return not self.failure and self.rows_equal and self.error <= self.budget

    @property
    def problem(self) -> str:
        """What is wrong, as a sentence that names the kernel; "" if nothing is."""
        kernel = f"kernel {self.isa}/{self.weight_format}/{self.activation} on {self.dtype} rows"
        if self.failure:
            return f"{kernel} failed: {self.failure}"
        if not self.error <= self.budget:
            return f"{kernel} has a relative error of {self.error:.2e}; the budget is {self.budget:.0e}"
        if not self.rows_equal:
            return f"{kernel} gives a row other bits in a batch than alone"
        return ""


def check_kernels(
    isas: Sequence[str] | None = None, activations: Sequence[Activation] = ACTIVATIONS
) -> Iterator[KernelCheck]:
    """Yield one record for each ISA, weight format, dtype of the hidden states and activation.

    isas: None is every one that runs on this machine. activations: all of them for the formats that differ in how
    they multiply and store activated rows, those of `QUICK_ACTIVATIONS` for the others.
    """
    for weight_format in FORMATS.values():
        some = activations if weight_format.name in _ROW_KINDS else [a for a in activations if a in QUICK_ACTIVATIONS]
        layers = [_Layer(weight_format, activation) for activation in some]
        for dtype, layer in itertools.product(_BUDGETS, layers):
            with _one_torch_thread():
                case = _Case(layer, dtype)
            for isa in machine().isas if isas is None else isas:
                yield case.check(isa)


def describe(activation: Activation) -> str:
    """Return a short name of an activation with its parameters."""
    name = activation.kind if activation.gated else f"{activation.kind} (not gated)"
    return f"{name} (limit {activation.limit:g})" if activation.limit else name


class _Layer:
    """A layer, which is packed once: all instruction sets read the same."""

    def __init__(self, weight_format: WeightFormat, activation: Activation) -> None:
        self.format, self.activation = weight_format, activation
        generator = torch.Generator().manual_seed(0)
        rows = INTERMEDIATE_SIZE * (2 if activation.gated else 1)
        gate_up = torch.randn(NUM_EXPERTS, rows, HIDDEN_SIZE, generator=generator) * HIDDEN_SIZE**-0.5
        down = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, generator=generator) * INTERMEDIATE_SIZE**-0.5
        # Values that the format represents: rounding of weights is not the kernel's error.
        self.weights = weight_format.round_trip(gate_up), weight_format.round_trip(down)
        self.biases = (
            torch.randn(NUM_EXPERTS, rows, generator=generator),
            torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=generator),
        )
        self.packed: PackedExperts | None = None
        self.failure = ""
        try:
            self.packed = pack_experts(*self.weights, weight_format.name, activation, *self.biases)
        except (RuntimeError, ValueError) as raised:
            self.failure = str(raised)


class _Case:
    """Inputs and right outputs, which are the same for every ISA."""

    def __init__(self, layer: _Layer, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype
        generator = torch.Generator().manual_seed(1)
        self._inputs, self._wanted = [], []
        (gate_up, down), biases, spec = layer.weights, layer.biases, ExpertsSpec(layer.activation)
        rows = reference.rows_of(layer.format)
        for tokens in TOKENS:
            x_TH = torch.randn(tokens, HIDDEN_SIZE, generator=generator).to(dtype)
            ids_TK = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
            weights_TK = torch.randn(tokens, TOP_K, generator=generator).softmax(1)
            inputs = (x_TH, ids_TK, weights_TK)
            self._inputs.append(inputs)
            self._wanted.append(reference.moe(*inputs, gate_up, down, spec, *biases, rows))

    def check(self, isa: str) -> KernelCheck:
        error, rows_equal, failure = 0.0, True, self._layer.failure
        experts = self._layer.packed
        try:
            if experts is not None:
                experts.isa = isa
                for inputs, wanted_TH in zip(self._inputs, self._wanted, strict=True):
                    got_TH = moe(*inputs, experts)
                    # NaN must win, which max() does not promise.
                    new = float((got_TH.double() - wanted_TH).norm() / wanted_TH.norm())
                    error = new if not new <= error else error
                    rows_equal &= _rows_alone_are_equal(inputs, got_TH, experts)
        except (RuntimeError, ValueError) as raised:
            failure = str(raised)
        return KernelCheck(
            isa,
            self._layer.format.name,
            str(self._dtype).removeprefix("torch."),
            describe(self._layer.activation),
            error,
            max(_BUDGETS[self._dtype], _CODE_STEP if self._layer.format.dynamic else 0),
            rows_equal,
            failure,
        )


def _rows_alone_are_equal(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_TH: torch.Tensor, experts: PackedExperts
) -> bool:
    for row in {0, len(batch_TH) // 2, len(batch_TH) - 1}:
        x_TH, ids_TK, weights_TK = (t[row : row + 1] for t in inputs)
        alone_TH = moe(x_TH, ids_TK, weights_TK, experts)
        if not torch.equal(alone_TH.view(torch.uint8), batch_TH[row : row + 1].view(torch.uint8)):
            return False
    return True


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """On a busy machine the threads of torch wait for each other far longer than tensors this small take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
