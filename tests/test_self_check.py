"""The self-check of packed experts: what is right passes and is left as it is; each fault is found and named."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.compare import assert_exact
from helpers.layers import DTYPES, EXPERTS, HIDDEN, Layer, random_inputs, random_layer
from helpers.processes import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ktcompile import ops
from ktcompile.machine import machine
from ktcompile.ops import Activation, PackedExperts, SelfCheckError, self_check
from ktcompile.ops.self_check import FirstCall
from ktcompile.quant import FORMATS, QuantizedWeight

Weights = tuple[torch.Tensor, torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Kernels = Callable[..., torch.Tensor]

# Modules, not what `ktcompile.ops` calls by their names.
MOE, EXPERTS_MODULE = (importlib.import_module(f"ktcompile.ops.{name}") for name in ("moe", "experts"))
QUANTISED = [name for name, f in FORMATS.items() if f.codec is not None]
FLOATS = [name for name, f in FORMATS.items() if f.codec is None]
LAST = EXPERTS - 1
# One of each family, and each way to share scales.
STORED_FORMATS = ("fp32", "bf16", "int8", "int4_g32", "int4_g64_zp", "fp8", "fp8_channel", "mxfp4")
SMALL = (3, 72, 40)

_SIZES = r"\(\d+ experts, hidden \d+, intermediate \d+\)"
STORED = re.compile(
    rf"self-check of (?P<layer>.+) {_SIZES}: (?P<weight>\w+) of expert (?P<expert>\d+) is stored wrongly: element "
    r"\[(?P<row>\d+), (?P<column>\d+)\] is (?P<got>\S+) in (?P<format>\w+), its source is (?P<wanted>\S+); that is "
    r"(?P<how>[\w ]+)\. .* KTCOMPILE_SELF_CHECK=0 turns this check off\."
)
COMPUTED = re.compile(
    rf"self-check of (?P<layer>.+) {_SIZES}: expert (?P<expert>\d+) on (?P<isa>\w+) with (?P<format>\w+) weights gives "
    r"(?P<got>\S+) at token (?P<token>\d+), column (?P<column>\d+); plain torch gives (?P<wanted>\S+) with the same "
    r"weights\. .* run `ktc doctor`, set KTCOMPILE_ISA=(?P<other>\w+), and .* KTCOMPILE_SELF_CHECK=0 turns this check "
    r"off\."
)


def caught(pattern: re.Pattern[str], call: Callable[[], object]) -> dict[str, str]:
    """Return what the SelfCheckError of `call` says."""
    with pytest.raises(SelfCheckError) as error:
        call()
    said = pattern.fullmatch(str(error.value))
    assert said, str(error.value)
    return said.groupdict()


def fresh_check(layer: Layer) -> FirstCall:
    return FirstCall(layer.gate_up, layer.weights[2:])


@functools.cache
def shared_layer(weight_format: str) -> tuple[Layer, PackedExperts]:
    """Return a layer with biases, packed once for the tests that bring their own checks."""
    layer = random_layer(weight_format=weight_format, bias=True)
    experts = layer.pack()
    experts.name = "a shared layer"  # to look one up takes longer than all else
    return layer, experts


def inputs_for(expert: int, dtype: torch.dtype = torch.float32, tokens: int = 9) -> Inputs:
    """Return inputs of which every token goes to one expert, with the weight 1."""
    x, ids, weights = random_inputs(tokens, dtype, top_k=1)
    return x, torch.full_like(ids, expert), torch.ones_like(weights)


# ---- what is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_right_layer_passes_with_the_bits_it_has_without_checks(weight_format, gated, bias, monkeypatch):
    layer = random_layer(activation=Activation("silu", gated), weight_format=weight_format, bias=bias, sizes=SMALL)
    checked = layer.pack()
    monkeypatch.setenv("KTCOMPILE_SELF_CHECK", "0")
    plain = layer.pack()
    for isa, dtype in itertools.product(machine().isas, DTYPES):
        checked.isa = plain.isa = isa
        checked.first_call = fresh_check(layer)
        inputs = random_inputs(5, dtype, sizes=SMALL)
        for _ in range(2):
            assert_exact(ops.moe(*inputs, checked), ops.moe(*inputs, plain), f"{isa}, {dtype}")
            assert checked.first_call is None and plain.first_call is None


def test_only_the_first_call_is_checked(monkeypatch):
    calls = kernel_calls(monkeypatch)
    experts = random_layer().pack()
    assert experts.first_call is not None
    ops.moe(*random_inputs(9), experts)
    assert experts.first_call is None and len(calls) == 4  # the first, the last and some other expert; and the call
    ops.moe(*random_inputs(9), experts)
    assert len(calls) == 5


def test_numbers_that_only_floats_hold_pass():
    layer = random_layer(torch.bfloat16)
    layer.gate_up[0, 1, 2], layer.gate_up[LAST, 3, 4], layer.down[0, 5, 6] = math.nan, math.inf, -0.0
    layer.pack()


# ---- weights that are stored wrongly ----------------------------------------------------------------------------


def store_instead(monkeypatch: pytest.MonkeyPatch, weights: Weights | tuple[QuantizedWeight, QuantizedWeight]) -> None:
    """Let packing write `weights`, whatever it is given."""
    packing = PackedExperts._packing
    monkeypatch.setattr(PackedExperts, "_packing", lambda self, *given: packing(self, *weights))


def of_element(w: torch.Tensor, e: int) -> None:
    w[e, 2, 3] += 1


def of_row(w: torch.Tensor, e: int) -> None:
    w[e, 2] *= 2


def of_column(w: torch.Tensor, e: int) -> None:
    w[e, :, 3] += 1


def of_place(w: torch.Tensor, e: int) -> None:
    w[e] = w[e].roll(1, 1)


def of_expert(w: torch.Tensor, e: int) -> None:
    w[e] = w[e - 1]


# What is wrong of an expert, and what is known of the element that is named.
STORED_FAULTS = {of_element: (2, 3), of_row: (2, None), of_column: (None, 3), of_place: (), of_expert: ()}


@pytest.mark.parametrize("fault", STORED_FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", [0, 1], ids=["gate_up", "down"])
@pytest.mark.parametrize("weight_format", STORED_FORMATS)
def test_a_weight_that_is_stored_wrongly_is_named(weight_format, which, fault, monkeypatch):
    layer = random_layer(weight_format=weight_format, sizes=SMALL)
    wrong = (layer.gate_up.clone(), layer.down.clone())
    fault(wrong[which], 2)
    store_instead(monkeypatch, wrong)
    said = caught(STORED, lambda: ops.pack_experts(layer.gate_up, layer.down, weight_format, name="a layer"))
    at = int(said["row"]), int(said["column"])
    assert (said["weight"], said["expert"]) == (("gate_up_proj", "down_proj")[which], "2")
    assert said["format"] == weight_format
    assert all(known in (None, place) for known, place in zip(STORED_FAULTS[fault], at, strict=False))
    stored, source = FORMATS[weight_format].round_trip(wrong[which][2]), (layer.gate_up, layer.down)[which][2]
    if weight_format in FLOATS:
        assert said["how"] == "which the format holds exactly"
        source = FORMATS[weight_format].round_trip(source)
    else:
        assert said["how"] == "more than rounding may make of it"
    assert float(said["got"]) == pytest.approx(float(stored[at]), rel=1e-6)
    assert float(said["wanted"]) == pytest.approx(float(source[at]), rel=1e-6)


@pytest.mark.parametrize("weight_format", FLOATS)
def test_floats_must_be_stored_exactly(weight_format, monkeypatch):
    layer = random_layer(FORMATS[weight_format].storage)
    wrong = (layer.gate_up.clone(), layer.down)
    bits = wrong[0].view(torch.int32 if weight_format == "fp32" else torch.int16)
    bits[0, 7, 70] ^= 1
    store_instead(monkeypatch, wrong)
    said = caught(STORED, layer.pack)
    assert (said["expert"], said["row"], said["column"]) == ("0", "7", "70")


def of_code(q: QuantizedWeight, e: int) -> None:
    q.codes[e, 2, 3] ^= 1


def of_scale(q: QuantizedWeight, e: int) -> None:
    q.scales[e, 2, 0] *= 2


def of_zero_point(q: QuantizedWeight, e: int) -> None:
    assert q.zeros is not None
    q.zeros[e, 2, 0] ^= 1


def of_places(q: QuantizedWeight, e: int) -> None:
    of_place(q.codes, e)


CODE_FAULTS = {of_code: (2, 3), of_scale: (2, None), of_zero_point: (2, None), of_places: ()}
CODE_CASES = [
    (name, fault)
    for name, fault in itertools.product(QUANTISED, CODE_FAULTS)
    if fault is not of_zero_point or FORMATS[name].has_zero_points
]


@pytest.mark.parametrize(("weight_format", "fault"), CODE_CASES, ids=lambda p: getattr(p, "__name__", p))
def test_codes_must_be_stored_exactly(weight_format, fault, monkeypatch):
    layer = random_layer(sizes=SMALL)
    right = [FORMATS[weight_format].quantize(w) for w in (layer.gate_up, layer.down)]
    zeros = right[1].zeros
    wrong = replace(
        right[1],
        codes=right[1].codes.clone(),
        scales=right[1].scales.clone(),
        zeros=None if zeros is None else zeros.clone(),
    )
    fault(wrong, 0)
    store_instead(monkeypatch, (right[0], wrong))
    said = caught(STORED, lambda: ops.pack_experts(*right, name="a layer"))
    at = int(said["row"]), int(said["column"])
    assert (said["weight"], said["expert"], said["format"]) == ("down_proj", "0", weight_format)
    assert said["how"] == "which the format holds exactly"
    assert all(known in (None, place) for known, place in zip(CODE_FAULTS[fault], at, strict=False))
    assert float(said["got"]) == pytest.approx(float(wrong.dequantize()[0][at]), rel=1e-6)
    assert float(said["wanted"]) == pytest.approx(float(right[1].dequantize()[0][at]), rel=1e-6)


def test_the_first_the_last_and_some_other_expert_are_compared(monkeypatch):
    sizes = (12, 24, 8)
    layer = random_layer(sizes=sizes)
    unpack, compared = PackedExperts.unpack, []
    monkeypatch.setattr(PackedExperts, "unpack", lambda self, e: (compared.append(e), unpack(self, e))[1])
    others = set()
    for number in range(10**9, 10**9 + 30):  # of the layer, which decides on the other expert
        compared.clear()
        packed_as(number, layer, monkeypatch)
        assert {0, 11} <= set(compared) and len(compared) <= 3
        others |= set(compared) - {0, 11}
    assert len(others) > 5
    sample = set(compared)
    for wrong_ones in ({e for e in range(12) if e not in sample}, *({e} for e in sample)):
        wrong = layer.gate_up.clone()
        wrong[list(wrong_ones)] += 1
        with monkeypatch.context() as patch:
            store_instead(patch, (wrong, layer.down))
            if wrong_ones.isdisjoint(sample):
                packed_as(number, layer, patch)
            else:
                said = caught(STORED, lambda patch=patch: packed_as(number, layer, patch))
                assert {int(said["expert"])} == wrong_ones


def packed_as(number: int, layer: Layer, monkeypatch: pytest.MonkeyPatch) -> PackedExperts:
    """Return the layer, packed as the one of this number."""
    monkeypatch.setattr(EXPERTS_MODULE, "_numbers", itertools.count(number))
    return layer.pack()


def test_a_poorly_represented_layer_is_warned_of_once(caplog):
    sizes = (3, 1024, 8)
    layer = random_layer(weight_format="int8", sizes=sizes)
    layer.gate_up[:, :, 7] *= 100  # one large column leaves the others few of the codes
    packed = ops.pack_experts(layer.gate_up, layer.down, "int8", name="a poor layer")
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert re.search(r"of a poor layer .*: int8 represents gate_up_proj of expert \d .* error of 0\.", caplog.text)
    ops.moe(*random_inputs(9, sizes=sizes), packed)  # it computes what it stores
    assert packed.first_call is None
    caplog.clear()
    random_layer(weight_format="int8", sizes=sizes).pack()
    assert not caplog.records


# ---- kernels that compute wrongly -------------------------------------------------------------------------------

WRONG = 2


def compute_with(monkeypatch: pytest.MonkeyPatch, kernels: Callable[..., torch.Tensor]) -> None:
    """Let `kernels` compute; its first argument is what did so before."""
    launch = MOE.launch
    monkeypatch.setattr(MOE, "launch", lambda *arguments: kernels(launch, *arguments))


def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """Return the inputs of all calls of kernels from now on."""
    calls: list[Inputs] = []
    compute_with(monkeypatch, lambda launch, *arguments: (calls.append(arguments[:3]), launch(*arguments))[1])
    return calls


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Kernels:
    """Return kernels that change the rows of one expert."""

    def kernels(launch: Kernels, x: torch.Tensor, ids: torch.Tensor, *others: object) -> torch.Tensor:
        out, rows = launch(x, ids, *others), (ids == WRONG).any(1)
        out[rows] = change(out[rows])
        return out

    return kernels


def of_another_expert(launch: Kernels, x: torch.Tensor, ids: torch.Tensor, *others: object) -> torch.Tensor:
    return launch(x, torch.where(ids == WRONG, WRONG + 1, ids), *others)


def of_other_rows(launch: Kernels, x: torch.Tensor, *others: object) -> torch.Tensor:
    return launch(x.roll(1, 1), *others)


def with_column(out: torch.Tensor, value: float) -> torch.Tensor:
    return out.index_fill(1, torch.tensor([3]), value)


KERNEL_FAULTS = {
    "NaN": changed(lambda out: with_column(out, math.nan)),
    "infinity": changed(lambda out: with_column(out, math.inf)),
    "a large element": changed(lambda out: with_column(out, 50)),
    "all zero": changed(torch.zeros_like),
    "scaled rows": changed(lambda out: out * 1.25),
    "columns in another place": changed(lambda out: out.roll(1, 1)),
    "another expert": of_another_expert,
    "rows in another place": of_other_rows,
}
NAMED_COLUMN = ("NaN", "infinity", "a large element")


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_kernels_that_compute_wrongly_are_named(weight_format, fault, monkeypatch):
    layer, experts = shared_layer(weight_format)
    for isa, dtype in zip(itertools.cycle(machine().isas), DTYPES, strict=False):
        inputs = inputs_for(WRONG, dtype)
        experts.isa, experts.first_call = isa, None
        right = ops.moe(*inputs, experts)
        experts.first_call = fresh_check(layer)
        with monkeypatch.context() as patch:
            compute_with(patch, KERNEL_FAULTS[fault])
            said = caught(COMPUTED, lambda inputs=inputs: ops.moe(*inputs, experts))
            experts.first_call = None
            wrong = ops.moe(*inputs, experts)
        at = int(said["token"]), int(said["column"])
        assert (said["expert"], said["isa"], said["format"]) == (str(WRONG), isa, weight_format)
        assert said["other"] != isa and said["other"] in machine().isas
        assert fault not in NAMED_COLUMN or at[1] == 3
        assert float(said["got"]) == pytest.approx(float(wrong[at]), rel=1e-6, nan_ok=True)
        assert float(said["wanted"]) == pytest.approx(float(right[at]), rel=0.02, abs=0.02)


@pytest.mark.parametrize("missing", ["gate_up_bias", "down_bias"])
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int8_dyn", "int4_g32_dyn"])
def test_a_missing_bias_is_found(weight_format, missing, monkeypatch):
    layer, experts = shared_layer(weight_format)
    experts.isa = machine().isa
    without = replace(layer, **{missing: torch.zeros_like(getattr(layer, missing))}).pack()
    compute_with(monkeypatch, lambda launch, *arguments: launch(*arguments[:3], without))
    for dtype in DTYPES:
        experts.first_call = fresh_check(layer)
        said = caught(COMPUTED, lambda dtype=dtype: ops.moe(*inputs_for(1, dtype), experts))
        assert said["expert"] == "1"


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_which_experts_of_the_first_call_are_compared(small, monkeypatch):
    monkeypatch.setattr(self_check, "_SMALL", 1 << 19 if small else 0)
    x, ids, weights = random_inputs(40, sizes=(12, 24, 8))
    ids %= 10
    ids += 1  # the first and the last expert have no tokens
    layer, compared = random_layer(sizes=(12, 24, 8)), []
    for number in range(10**9, 10**9 + 12):
        experts = packed_as(number, layer, monkeypatch)
        with monkeypatch.context() as patch:
            calls = kernel_calls(patch)
            ops.moe(x, ids, weights, experts)
        assert torch.equal(calls[-1][1], ids)
        compared.append({int(e) for _, checked, _ in calls[:-1] for e in checked.unique()})
    assert set.union(*compared) <= set(range(1, 11))
    if small:
        assert all({1, 10} <= some and len(some) <= 3 for some in compared)
    else:
        assert all(len(some) == 1 for some in compared) and {1} in compared and {10} in compared
    assert {1, 10} < set.union(*compared)


NOISY = random_layer(bias=True)
NOISY_EXPERTS = NOISY.pack()


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    one=st.booleans(),
    within=st.floats(0, 0.5),
    beyond=st.floats(10, 1e4),
)
def test_the_size_of_an_error_decides(dtype, seed, one, within, beyond):
    def noisy(size: float) -> Kernels:
        def kernels(*arguments: object) -> torch.Tensor:
            out = MOE.launch(*arguments)
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
            if one:
                noise[:, torch.arange(HIDDEN) != seed % HIDDEN] = 0
            noise *= (size * self_check._ALLOWED[dtype] * out.float().norm(dim=1) / noise.norm(dim=1))[:, None]
            return (out.float() + noise).to(dtype)

        return kernels

    inputs = random_inputs(5, dtype, seed=seed)
    NOISY_EXPERTS.first_call = check = fresh_check(NOISY)
    with pytest.raises(SelfCheckError):
        check.check(NOISY_EXPERTS, *inputs[:2], noisy(beyond))
    NOISY_EXPERTS.first_call = check = fresh_check(NOISY)
    check.check(NOISY_EXPERTS, *inputs[:2], noisy(within))
    assert NOISY_EXPERTS.first_call is None


def test_kernels_that_were_wrong_once_are_wrong_at_every_call(monkeypatch):
    experts = random_layer().pack()
    compute_with(monkeypatch, KERNEL_FAULTS["scaled rows"])
    first = caught(COMPUTED, lambda: ops.moe(*inputs_for(WRONG), experts))
    for inputs in (inputs_for(WRONG + 1), inputs_for(WRONG), inputs_for(0, tokens=0)):
        for _ in range(2):
            assert caught(COMPUTED, lambda inputs=inputs: ops.moe(*inputs, experts)) == first
    assert experts.first_call is not None


# ---- rows that cannot be compared -------------------------------------------------------------------------------

UNUSABLE = {
    "zero": lambda x: x * 0,
    "NaN": lambda x: x.index_fill(1, torch.tensor([4]), math.nan),
    "infinite": lambda x: x.index_fill(1, torch.tensor([4]), -math.inf),
    "huge": lambda x: x * 2.0**100,
    "overflowing": lambda x: x * 2.0**50,
    "none": lambda x: x[:0],
}


@pytest.mark.parametrize("weight_format", ["bf16", "int8_dyn", "int4_g32_zp", "int4_g32_dyn"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_rows_that_cannot_be_compared_are_waited_out(kind, weight_format, monkeypatch):
    layer = random_layer(weight_format=weight_format, bias=True)
    checked, (x, ids, weights) = layer.pack(), random_inputs(9)
    monkeypatch.setenv("KTCOMPILE_SELF_CHECK", "0")
    plain, bad = layer.pack(), UNUSABLE[kind](x)
    few = slice(0, len(bad))
    for _ in range(3):
        inputs = (bad, ids[few], weights[few])
        assert_exact(ops.moe(*inputs, checked), ops.moe(*inputs, plain))
        assert checked.first_call is not None
    x[: len(bad) // 2] = bad[: len(bad) // 2]
    calls = kernel_calls(monkeypatch)
    assert_exact(ops.moe(x, ids, weights, checked), ops.moe(x, ids, weights, plain))
    assert checked.first_call is None
    compared = calls[0][0]
    assert len(compared) and (kind == "overflowing" or (compared.abs().amax(1) < 100).all())


def test_rows_of_no_expert_are_waited_out(monkeypatch):
    experts, (x, ids, weights) = random_layer().pack(), random_inputs(9)
    for none in (torch.full_like(ids, EXPERTS), torch.full_like(ids, 2**40), torch.full_like(ids, EXPERTS).int()):
        ops.moe(x, none, weights, experts)
        assert experts.first_call is not None
    ids[:, 0], ids[:, 1], ids[:, 2] = EXPERTS, 3, 2**40
    calls = kernel_calls(monkeypatch)
    ops.moe(x, ids, weights, experts)
    assert experts.first_call is None and [c[1].unique().tolist() for c in calls[:-1]] == [[3]]


def test_a_faulty_row_beyond_those_that_cannot_be_compared_is_found(monkeypatch):
    experts, (x, ids, weights) = random_layer().pack(), inputs_for(WRONG)
    x[:7] = 0
    compute_with(monkeypatch, KERNEL_FAULTS["NaN"])
    assert caught(COMPUTED, lambda: ops.moe(x, ids, weights, experts))["token"] in ("7", "8")


def test_patience_ends():
    experts, (x, ids, weights) = random_layer(sizes=(5, 8, 8)).pack(), random_inputs(2, sizes=(5, 8, 8))
    for _ in range(self_check._PATIENCE):
        assert experts.first_call is not None
        ops.moe(x * 0, ids, weights, experts)
    assert experts.first_call is None


def test_calls_without_tokens_take_no_patience():
    experts, (x, ids, weights) = random_layer(sizes=(5, 8, 8)).pack(), random_inputs(2, sizes=(5, 8, 8))
    for _ in range(2 * self_check._PATIENCE):
        ops.moe(x[:0], ids[:0], weights[:0], experts)
    assert experts.first_call is not None


# ---- names, switch, threads, processes --------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(w) for w in layer.weights[:2])


def test_a_layer_is_called_by_its_name_its_module_or_its_number(monkeypatch):
    layer = random_layer()
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), Experts(layer)])})
    module = model["layers"][1]
    of_module = (module.gate_up_proj, module.down_proj)
    wrong = tuple(w + 1 for w in layer.weights[:2])
    number = 10**9 + 100
    for weights, name, called in (
        (of_module, "block 7", "block 7"),
        (of_module, "", "layers.1"),
        (layer.weights[:2], "", f"experts {number} in the order of packing"),
    ):
        if called.startswith("experts"):
            del model, module, of_module
            weights = tuple(w.clone() for w in weights)
        monkeypatch.setattr(EXPERTS_MODULE, "_numbers", itertools.count(number))
        experts = ops.pack_experts(*weights, name=name)
        with monkeypatch.context() as patch:
            compute_with(patch, KERNEL_FAULTS["NaN"])
            assert caught(COMPUTED, lambda experts=experts: ops.moe(*inputs_for(WRONG), experts))["layer"] == called
        with monkeypatch.context() as patch:
            patch.setattr(EXPERTS_MODULE, "_numbers", itertools.count(number))
            store_instead(patch, wrong)
            said = caught(STORED, lambda weights=weights, name=name: ops.pack_experts(*weights, name=name))
            assert said["layer"] == called


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("KTCOMPILE_SELF_CHECK", "0")
    layer = random_layer()
    store_instead(monkeypatch, tuple(w + 1 for w in layer.weights[:2]))
    compute_with(monkeypatch, KERNEL_FAULTS["NaN"])
    experts = layer.pack()
    assert experts.first_call is None
    assert ops.moe(*inputs_for(WRONG), experts)[:, 3].isnan().all()


@pytest.fixture
def slow_check(monkeypatch) -> list[FirstCall]:
    """Give the checks that were made, each of which takes its time."""
    made, check = [], FirstCall._check

    def slow(self: FirstCall, *arguments: object) -> bool:
        made.append(self)
        time.sleep(0.1)
        return check(self, *arguments)

    monkeypatch.setattr(FirstCall, "_check", slow)
    return made


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_two_threads_check_once(wrong, slow_check, monkeypatch):
    experts = random_layer().pack()
    if wrong:
        compute_with(monkeypatch, KERNEL_FAULTS["NaN"])
    together, outcomes = threading.Barrier(2), []

    def call() -> None:
        together.wait()
        try:
            outcomes.append(ops.moe(*inputs_for(WRONG), experts))
        except SelfCheckError as error:
            outcomes.append(str(error))

    callers = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(slow_check) == 1 and len(outcomes) == 2
    if wrong:
        assert isinstance(outcomes[0], str) and outcomes[0] == outcomes[1]
    else:
        assert_exact(outcomes[0], outcomes[1])


def test_a_fork_while_another_thread_checks():
    run_python(
        """
        import os, threading, torch
        from ktcompile import ops
        from ktcompile.ops.self_check import FirstCall

        torch.manual_seed(0)
        experts = ops.pack_experts(torch.randn(4, 64, 48), torch.randn(4, 48, 32))
        inputs = torch.randn(9, 48), torch.randint(4, (9, 2)), torch.rand(9, 2)
        inside, go_on, check, parent = threading.Event(), threading.Event(), FirstCall._check, os.getpid()

        def waiting(*arguments):
            if os.getpid() == parent:
                inside.set()
                assert go_on.wait(30)
            return check(*arguments)

        FirstCall._check = waiting
        thread = threading.Thread(target=ops.moe, args=(*inputs, experts))
        thread.start()
        assert inside.wait(30)
        child = os.fork()
        if child == 0:
            ops.moe(*inputs, experts)
            os._exit(0 if experts.first_call is None else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert experts.first_call is not None
        go_on.set()
        thread.join()
        assert experts.first_call is None
        """,
        timeout=60,
    )
