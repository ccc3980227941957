"""Packed experts against plain torch, at load: a sample of what was packed, and of what the kernels first compute.

`PackingCheck` compares stored weights with their source while both are at hand. The bound is the rounding that the
format does to each group of weights. It holds for all weights, unlike a bound on the layer's output: with a few large
columns int8 rounds the others to almost nothing, and that is a poor choice of format but no fault.
`FirstCall` compares what the kernels make of the first tokens with fp64 on the very weights that are stored, so that
little more than the rounding of rows is allowed.

Shape suffixes: T tokens, K top_k, H hidden_size, I intermediate_size, R rows, N output and C input features of a
weight, G groups of a row, S columns of a group.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ktcompile.log import warn_once
from ktcompile.machine import machine
from ktcompile.ops import reference
from ktcompile.ops.modules import qualified_name
from ktcompile.ops.spec import Activation
from ktcompile.ops.weights import ExpertsWeight, StoredWeight, Weight
from ktcompile.quant import QuantizedWeight, WeightFormat

if TYPE_CHECKING:
    from ktcompile.ops.experts import PackedExperts

    Kernels = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedExperts], torch.Tensor]

# Largest error of one weight, as a share of the largest magnitude of its group, by layout; a little above half a step.
_ROUNDING = {"int8": 1 / 250, "int8_dyn": 1 / 250, "fp8": 1 / 15}
# The same for the root mean square over a group, where the largest weights are clipped in favour of the others.
_GROUP_ROUNDING = {"int4": 1 / 13, "int4_dyn": 1 / 13, "mxfp4": 1 / 4}
# Weights of which a share this small of the largest is lost: fp8 has no smaller numbers in a block.
_LOST = 2.0**-18
# Smaller numbers may be zero: the formats and the kernels do not keep them.
_TINY = 2.0**-90
# Larger ones may overflow fp32 in a sum, where fp64 does not.
_HUGE = 2.0**60
# More than this much beyond a format's budget for Gaussian weights, in the norm, is worth a warning.
_POOR = 3.0

# Relative error of an expert's output that is allowed, by the dtype of its rows: sums in fp32, the rounding of the
# output, and for bf16 that of the activated rows. Observed is less than a third of it.
_ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Large experts are checked one for each layer, small ones three.
_SMALL = 1 << 19
# Tokens of a call to choose from, rows for the kernels, which have other ways for many, and rows for the reference.
_CANDIDATES, _KERNEL_ROWS, _REFERENCE_ROWS = 64, 32, 3
# Calls to wait for tokens that can be used, before a layer is left unchecked.
_PATIENCE = 64
# Weights that are compared at once, and rows that may share a scale.
_SLICE, _BLOCK_ROWS = 1 << 18, 128

_NAMES = ("gate_up_proj", "down_proj")
_OFF = "KTCOMPILE_SELF_CHECK=0 turns this check off."


class SelfCheckError(RuntimeError):
    """Packed experts do not compute what plain torch computes."""


class PackingCheck:
    """Compares a sample of a layer's experts, as stored, with their source."""

    def __init__(self, packed: PackedExperts, gate_up: ExpertsWeight, down: ExpertsWeight) -> None:
        self._packed, self._weights = packed, (gate_up, down)
        some = random.Random(packed.number).randrange(packed.num_experts)
        self._experts = frozenset((0, packed.num_experts - 1, some))
        self._lock, self._warned = threading.Lock(), False

    def order(self) -> list[int]:
        """Return all experts, those of the sample first, so that no thread is left with one at the end."""
        return sorted(range(self._packed.num_experts), key=lambda e: e not in self._experts)

    def __call__(self, expert: int) -> None:
        """Check an expert that was packed, if it is in the sample. SelfCheckError: it is stored wrongly."""
        if expert not in self._experts:
            return
        for name, weight, stored_NC in zip(_NAMES, self._weights, self._packed.unpack(expert), strict=True):
            with torch.no_grad():
                if isinstance(weight, StoredWeight):
                    self._check(f"{name} of expert {expert}", weight.read(expert).unsqueeze(0), 0, stored_NC)
                else:
                    self._check(f"{name} of expert {expert}", weight, expert, stored_NC)

    def _check(self, what: str, weight: Weight, expert: int, stored_NC: torch.Tensor) -> None:
        weight_format, transposed = self._packed.format, self._packed.spec.transposed
        rounded = weight_format.codec is not None and isinstance(weight, torch.Tensor)
        error = size = 0.0
        step = max(1, _SLICE // stored_NC.shape[1] // _BLOCK_ROWS) * _BLOCK_ROWS
        for begin in range(0, len(stored_NC), step):
            some_NC = stored_NC[begin : begin + step]
            source_NC = _rows_of_expert(weight, expert, slice(begin, begin + step), transposed).to(some_NC.dtype)
            if rounded:
                difference_NC = some_NC - source_NC
                worst = _worst_weight(difference_NC, source_NC, weight_format)
                error += float(torch.linalg.vector_norm(difference_NC)) ** 2
                size += float(torch.linalg.vector_norm(source_NC)) ** 2
            else:
                worst = _other_value(some_NC, source_NC)
            if worst is not None:
                values = float(some_NC[worst]), float(source_NC[worst])
                self._fail(what, (begin + worst[0], worst[1]), values, rounded)
        if size and math.sqrt(error / size) > _POOR * weight_format.error_budget and self._is_first_warning():
            warn_once(
                f"{self._label()}: {weight_format.name} represents {what} with a relative error of "
                f"{math.sqrt(error / size):.2g}, where Gaussian weights stay within {weight_format.error_budget:.2g}; "
                "another weight format may suit the layer better"
            )

    def _is_first_warning(self) -> bool:
        with self._lock:
            first, self._warned = not self._warned, True
        return first

    def _fail(self, what: str, at: tuple[int, int], values: tuple[float, float], rounded: bool) -> None:
        packed = self._packed
        how = "more than rounding may make of it" if rounded else "which the format holds exactly"
        raise SelfCheckError(
            f"{self._label()}: {what} is stored wrongly: element [{at[0]}, {at[1]}] is {values[0]:.8g} in "
            f"{packed.format.name}, its source is {values[1]:.8g}; that is {how}. Packing failed (the machine's best "
            f"ISA is {machine().isa}, this layer is for {packed.isa}): please report it. {_OFF}"
        )

    def _label(self) -> str:
        source = self._weights[0]
        return layer_label(self._packed, source if isinstance(source, torch.Tensor) else None)


class FirstCall:
    """Compares what the kernels make of the first tokens with fp64, once."""

    def __init__(self, source: ExpertsWeight | None, biases: Sequence[torch.Tensor | None]) -> None:
        self._source = weakref.ref(source) if isinstance(source, torch.Tensor) else None
        self._biases = [None if b is None else b.detach().clone() for b in biases]
        self._lock, self._process = threading.Lock(), os.getpid()
        self._attempts, self._failure = 0, ""

    def check(self, packed: PackedExperts, x_TH: torch.Tensor, ids_TK: torch.Tensor, kernels: Kernels) -> None:
        """Check a sample of the experts that tokens are routed to, and take it off `packed` once there was one.

        Rows that are zero, or not finite, or would overflow are left out. SelfCheckError: an expert's output is wrong,
        or was at an earlier call.
        """
        if self._process != os.getpid():  # in the parent, another thread may have held the lock at the fork
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            if packed.first_call is not self:
                return
            if self._failure:
                raise SelfCheckError(self._failure)
            try:
                with torch.no_grad():
                    compared = self._check(packed, x_TH, ids_TK, kernels)
            except SelfCheckError as error:
                self._failure = str(error)
                raise
            self._attempts += int(len(x_TH) > 0)  # calls without tokens say nothing
            if compared or self._attempts == _PATIENCE:
                packed.first_call = None

    def _check(self, packed: PackedExperts, x_TH: torch.Tensor, ids_TK: torch.Tensor, kernels: Kernels) -> bool:
        """Return whether there was something to compare."""
        tokens = _spread(len(x_TH), _CANDIDATES)
        x_RH, ids_RK = x_TH[tokens], ids_TK[tokens].long()  # copies, which nobody changes meanwhile
        most_R = x_RH.abs().amax(1)
        usable_R = (most_R > 0) & (most_R <= _HUGE)  # NaN compares as false
        tokens, x_RH, ids_RK = tokens[usable_R], x_RH[usable_R], ids_RK[usable_R]
        touched = ids_RK[(ids_RK >= 0) & (ids_RK < packed.num_experts)].unique().tolist()  # type: ignore[no-untyped-call]
        compared = False
        for expert in _sample(touched, packed):
            chosen = (ids_RK == expert).any(1).nonzero()[:_KERNEL_ROWS, 0]
            compared |= self._check_expert(packed, expert, tokens[chosen], x_RH[chosen], kernels)
        return compared

    def _check_expert(
        self, packed: PackedExperts, expert: int, tokens: torch.Tensor, x_RH: torch.Tensor, kernels: Kernels
    ) -> bool:
        ids = torch.full((len(x_RH), 1), expert, dtype=torch.int64, device="cpu")
        ones = torch.ones(len(x_RH), 1, dtype=torch.float32, device="cpu")
        got_RH = kernels(x_RH, ids, ones, packed).double()
        rows = _spread(len(x_RH), _REFERENCE_ROWS)
        expected = self._expected(packed, expert, x_RH[rows])
        difference_RH, relative_R, allowed_R = expected.compare(got_RH[rows], x_RH.dtype)
        for r, error, allowed in zip(itertools.count(), relative_R.tolist(), allowed_R.tolist(), strict=False):
            if not error <= allowed:  # NaN is not
                column = int(difference_RH[r].abs().nan_to_num(torch.inf).argmax())
                got, wanted = float(got_RH[rows[r], column]), float(expected.rows[r, column])
                raise SelfCheckError(
                    f"{layer_label(packed, self._source_tensor())}: expert {expert} on {packed.isa} with "
                    f"{packed.format.name} weights gives {got:.8g} at token {int(tokens[rows[r]])}, column {column}; "
                    f"plain torch gives {wanted:.8g} with the same weights. The row's relative error is {error:.2g}, "
                    f"allowed is {allowed:.2g}. Results of these kernels cannot be trusted here: run `ktc doctor`"
                    f"{_advice(packed.isa)}, and please report it. {_OFF}"
                )
        return bool((allowed_R < torch.inf).any())

    def _expected(self, packed: PackedExperts, expert: int, x_RH: torch.Tensor) -> _Expected:
        gate_up, down = packed.unpack(expert)
        rows, spec = reference.rows_of(packed.format), packed.spec
        biases = [None if b is None else b[expert] for b in self._biases]
        first = reference.linear(rows(x_RH), gate_up, biases[0])
        hidden_RI = reference.activate(first, spec.activation, spec.interleaved)
        # Dynamic formats quantise the part of each memory node for itself.
        parts = [rows(part) for part in torch.split(hidden_RI, packed.native.slices, 1)]
        wanted_RH = reference.linear(torch.cat(parts, 1), down, biases[1])
        passing_R = _without_cutoff(first, spec.activation, spec.interleaved).norm(dim=1)
        scale_R = passing_R * float(torch.linalg.vector_norm(down, dtype=torch.float32)) / math.sqrt(down.shape[1])
        slack_R = torch.zeros_like(scale_R)
        if packed.format.dynamic:  # two of the activated values may be rounded to the next code
            slack_R = hidden_RI.abs().amax(1) * (2 / 127) * float(torch.linalg.vector_norm(down, dim=0).max())
        return _Expected(wanted_RH, scale_R, slack_R)

    def _source_tensor(self) -> torch.Tensor | None:
        return None if self._source is None else self._source()


def layer_label(packed: PackedExperts, source: torch.Tensor | None) -> str:
    """Return how a message calls a layer. It may look through all modules."""
    tensors = [packed.handle] if source is None else [packed.handle, source]
    name = packed.name or qualified_name(tensors) or packed.label
    sizes = f"{packed.num_experts} experts, hidden {packed.hidden_size}, intermediate {packed.intermediate_size}"
    return f"self-check of {name} ({sizes})"


@dataclass(frozen=True, slots=True)
class _Expected:
    """What an expert ought to give, in fp64: rows [R, H].

    scales: [R], the size of a row whose activation lets everything pass. Rounding before the activation is of that
    size, however little the activation leaves. slack: [R], an error that is allowed beside the relative one.
    """

    rows: torch.Tensor
    scales: torch.Tensor
    slack: torch.Tensor

    def compare(self, got_RH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what is wrong, and for each row the relative error and the one that is allowed.

        Values that may be infinite in `dtype` are not compared. Infinitely much is allowed where sums may overflow.
        """
        limit = torch.finfo(dtype)
        usable_RH = self.rows.abs() <= limit.max / 2
        difference_RH = (got_RH - self.rows).where(usable_RH, 0)
        scale_R = self.scales + self.rows.where(usable_RH, 0).norm(dim=1) + _TINY
        floor = math.sqrt(self.rows.shape[1]) * max(limit.smallest_normal * limit.eps, _TINY)
        allowed_R = _ALLOWED[dtype] + (self.slack + floor) / scale_R
        can_overflow_R = ~(scale_R <= _HUGE)  # so does NaN
        relative_R = (difference_RH.norm(dim=1) / scale_R).masked_fill(can_overflow_R, 0)
        return difference_RH, relative_R, allowed_R.masked_fill(can_overflow_R, torch.inf)


def _advice(isa: str) -> str:
    others = [other for other in machine().isas if other != isa]
    return f", set KTCOMPILE_ISA={others[0]}" if others else ""


def _other_value(stored_NC: torch.Tensor, wanted_NC: torch.Tensor) -> tuple[int, int] | None:
    """Return where the first value is that differs, or None. NaN equals NaN."""
    if torch.equal(stored_NC, wanted_NC):
        return None
    wrong = ((stored_NC != wanted_NC) & ~(stored_NC.isnan() & wanted_NC.isnan())).nonzero()
    return (int(wrong[0, 0]), int(wrong[0, 1])) if len(wrong) else None


def _worst_weight(
    difference_NC: torch.Tensor, source_NC: torch.Tensor, weight_format: WeightFormat
) -> tuple[int, int] | None:
    """Return where the weight is that is farthest off, or None if all are within the rounding of their format."""
    share_NG = _shares(difference_NC, source_NC, weight_format)
    if bool((share_NG <= 1).all()):  # NaN compares as false
        return None
    row, group = divmod(int(share_NG.nan_to_num(torch.inf).argmax()), share_NG.shape[1])
    size = weight_format.group_size or source_NC.shape[1]
    begin = group * size
    return row, begin + int(difference_NC[row, begin : begin + size].abs().nan_to_num(torch.inf).argmax())


def _shares(difference_NC: torch.Tensor, source_NC: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """Return the error of each group as a share of what is allowed, [N, G]."""
    size = weight_format.group_size or source_NC.shape[1]
    difference_NGS, source_NGS = (_grouped(w, size) for w in (difference_NC, source_NC))
    largest_NG = source_NGS.abs().amax(2)
    floor = float(largest_NG.max()) * _LOST + _TINY
    if weight_format.layout in _ROUNDING:
        share, error_NG = _ROUNDING[weight_format.layout], difference_NGS.abs().amax(2)
    else:
        share = _GROUP_ROUNDING[weight_format.layout]
        error_NG = torch.linalg.vector_norm(difference_NGS, 2, 2) / math.sqrt(size)
    return torch.div(error_NG, share * largest_NG + floor)


def _grouped(weight_NC: torch.Tensor, size: int) -> torch.Tensor:
    """Return [N, G, S] with zeros after the last column."""
    padding = -weight_NC.shape[1] % size
    return (F.pad(weight_NC, (0, padding)) if padding else weight_NC).reshape(len(weight_NC), -1, size)


def _rows_of_expert(weight: Weight, expert: int, rows: slice, transposed: bool) -> torch.Tensor:
    """Return rows of one expert's weight [N, C]; dequantised if it is quantised."""
    if isinstance(weight, torch.Tensor):
        weight_NC = weight[expert].mT if transposed else weight[expert]
        return weight_NC[rows]
    zeros = None if weight.zeros is None else weight.zeros[expert, rows]
    return QuantizedWeight(weight.format, weight.codes[expert, rows], weight.scales[expert, rows], zeros).dequantize()


def _without_cutoff(first: torch.Tensor, activation: Activation, interleaved: bool) -> torch.Tensor:
    """Return what would come of the activation, in magnitude, if its gate were open."""
    if not activation.gated:
        return _opened(first.abs(), activation)
    gate, up = reference.gate_and_up(first, activation, interleaved)
    up = up.abs() + (1 if activation.kind == "swigluoai" else _TINY)
    return _opened(gate.abs(), activation) * up


def _opened(magnitude: torch.Tensor, activation: Activation) -> torch.Tensor:
    magnitude = magnitude + _TINY
    return magnitude.square() if activation.kind == "relu2" else magnitude


def _sample(touched: list[int], packed: PackedExperts) -> list[int]:
    """Return the first, the last and some other one, or one of these by turns."""
    if not touched:
        return []
    number = packed.number
    some = [touched[0], touched[-1], random.Random(number).choice(touched[1:-1] or touched)]
    weights = 3 * packed.hidden_size * packed.intermediate_size
    return sorted(set(some)) if weights <= _SMALL else [some[number % 3]]


def _spread(count: int, most: int) -> torch.Tensor:
    """Return up to `most` numbers of [0, count), evenly apart, with the first and the last."""
    most = min(most, count)
    return torch.tensor([i * (count - 1) // max(1, most - 1) for i in range(most)], dtype=torch.int64, device="cpu")
