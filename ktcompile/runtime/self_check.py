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
QUICK_ACTIVATIONS = (Activation("silu"), Activation("swigluoai", alpha=1.702, limit=0.7))

# By the dtype of the hidden states: it decides how outputs are rounded, and how intermediates may be.
# A code of int8_dyn may round to its neighbour for a last bit in the rows.
_CODE_STEP = 1e-2
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

    isas: None is every one that runs on this machine.
    """
    for weight_format, dtype, activation in itertools.product(FORMATS.values(), _BUDGETS, activations):
        with _one_torch_thread():
            case = _Case(weight_format, dtype, activation)
        for isa in machine().isas if isas is None else isas:
            yield case.check(isa)


def describe(activation: Activation) -> str:
    """Return a short name of an activation with its parameters."""
    name = activation.kind if activation.gated else f"{activation.kind} (not gated)"
    return f"{name} (limit {activation.limit:g})" if activation.limit else name


class _Case:
    """Inputs and right outputs, which are the same for every ISA."""

    def __init__(self, weight_format: WeightFormat, dtype: torch.dtype, activation: Activation) -> None:
        self._format, self._dtype, self._activation = weight_format, dtype, activation
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        rows = INTERMEDIATE_SIZE * (2 if activation.gated else 1)
        gate_up = normal(NUM_EXPERTS, rows, HIDDEN_SIZE) * HIDDEN_SIZE**-0.5
        down = normal(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE) * INTERMEDIATE_SIZE**-0.5
        # Values that the format represents: rounding of weights is not the kernel's error.
        self._weights = weight_format.round_trip(gate_up), weight_format.round_trip(down)
        self._biases = normal(NUM_EXPERTS, rows), normal(NUM_EXPERTS, HIDDEN_SIZE)
        self._inputs, self._wanted = [], []
        spec = ExpertsSpec(activation)
        for tokens in TOKENS:
            x_TH = normal(tokens, HIDDEN_SIZE).to(dtype)
            ids_TK = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
            weights_TK = normal(tokens, TOP_K).softmax(1)
            self._inputs.append((x_TH, ids_TK, weights_TK))
            rows = reference.rows_of(weight_format)
            wanted_TH = reference.moe(x_TH, ids_TK, weights_TK, *self._weights, spec, *self._biases, rows)
            self._wanted.append(wanted_TH)

    def check(self, isa: str) -> KernelCheck:
        error, rows_equal, failure = 0.0, True, ""
        try:
            experts = pack_experts(*self._weights, self._format.name, self._activation, *self._biases, isa=isa)
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
            self._format.name,
            str(self._dtype).removeprefix("torch."),
            describe(self._activation),
            error,
            max(_BUDGETS[self._dtype], _CODE_STEP if self._format.layout == "int8_dyn" else 0),
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
