"""`ops.pack_experts` and `ops.moe`: right on every kernel, the same bits whatever the batch, threads and ISA, and
plain errors for what cannot be used."""

from __future__ import annotations

import gc
import itertools
import math
import re
import threading

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction, assert_rounding, relative_error
from helpers.layers import DTYPES, EXPERTS, HIDDEN, INTERMEDIATE, random_inputs, random_layer
from helpers.processes import run_python

from ktcompile import ops
from ktcompile.machine import machine
from ktcompile.ops import Activation
from ktcompile.quant import FORMATS

ISAS = machine().isas
ACTIVATIONS = (
    *(
        Activation(kind, gated)
        for kind in ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2")
        for gated in (True, False)
    ),
    Activation("gelu_tanh", limit=0.5),
    Activation("swigluoai", alpha=1.702, limit=0.7),
    Activation("swigluoai", alpha=1.3),
)
LAYOUTS = tuple(itertools.product((False, True), repeat=2))  # interleaved, transposed


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_results_are_those_of_the_reference(isa, weight_format, dtype):
    for n, (activation, (interleaved, transposed)) in enumerate(itertools.product(ACTIVATIONS, LAYOUTS)):
        layer = random_layer(
            DTYPES[n % 3],
            activation,
            weight_format,
            interleaved=interleaved,
            transposed=transposed,
            bias=n % 2 == 0,
            seed=n,
        )
        inputs = random_inputs(7, dtype, seed=n)
        what = f"{activation}, interleaved {interleaved}, transposed {transposed}"
        got, wanted = ops.moe(*inputs, layer.pack(isa)), layer.reference(*inputs)
        if weight_format == "int8_dyn":  # a code may round to its neighbour for a last bit in the rows
            assert relative_error(got, wanted) < 1e-2, what
        else:
            assert_reduction(got, wanted, what)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 33, 17), (5, 2, 1), (3, 1, 40), (64, 16, 8)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_awkward_sizes(isa, sizes):
    for dtype in DTYPES:
        layer = random_layer(dtype, bias=True, sizes=sizes)
        top_k = min(3, sizes[0])
        inputs = random_inputs(9, dtype, sizes=sizes, top_k=top_k)
        assert_reduction(ops.moe(*inputs, layer.pack(isa)), layer.reference(*inputs), name_of(dtype))


def test_an_output_is_rounded_once_where_sums_are_exact():
    # Identity experts in fp32 on half-precision rows: only the last store rounds.
    eye = torch.eye(HIDDEN)[None]
    experts = ops.pack_experts(eye, eye, activation=Activation("relu", gated=False))
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.rand(40, HIDDEN).to(dtype)
        weights = torch.rand(40, 1)
        got = ops.moe(x, torch.zeros(40, 1, dtype=torch.int64), weights, experts)
        assert_rounding(got, x.double() * weights.double(), name_of(dtype))


# ---- the same bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_depends_neither_on_its_batch_nor_on_threads(isa, dtype, threads):
    experts = random_layer(dtype, bias=True).pack(isa)
    x, ids, weights = random_inputs(300, dtype)
    threads(1)
    alone = torch.cat([ops.moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], experts) for t in range(300)])
    for count in (1, 2, 5):
        threads(count)
        for tokens in (1, 2, 7, 64, 300):
            for begin in {0, 300 - tokens}:
                part = slice(begin, begin + tokens)
                got = ops.moe(x[part], ids[part], weights[part], experts)
                assert_exact(got, alone[part], f"{tokens} tokens from {begin} on {count} threads")


def test_a_row_does_not_depend_on_the_values_of_others():
    for isa in ISAS:
        experts = random_layer().pack(isa)
        x, ids, weights = random_inputs(20)
        want = ops.moe(x, ids, weights, experts)
        x[3], x[8], x[11] = math.nan, math.inf, 3e38
        got = ops.moe(x, ids, weights, experts)
        others = [t for t in range(20) if t not in (3, 8, 11)]
        assert_exact(got[others], want[others], isa)
        assert got[3].isnan().all()


def test_slots_may_come_in_any_order():
    experts = random_layer().pack()
    x, ids, weights = random_inputs(20)
    order = torch.tensor([2, 0, 1])
    assert_exact(ops.moe(x, ids[:, order], weights[:, order], experts), ops.moe(x, ids, weights, experts))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_isa_gives_the_same_bits(weight_format, dtype):
    for n, activation in enumerate(ACTIVATIONS):
        layer = random_layer(torch.float32, activation, weight_format, bias=True, seed=n)
        inputs = random_inputs(13, dtype, seed=n)
        want = ops.moe(*inputs, layer.pack("scalar"))
        for isa in ISAS:
            assert_exact(ops.moe(*inputs, layer.pack(isa)), want, f"{isa} against scalar, {activation}")


def test_calls_from_several_threads_at_once():
    layers = [random_layer(dtype, seed=n) for n, dtype in enumerate((*DTYPES, torch.float32))]
    experts = [layer.pack() for layer in layers]
    inputs = [random_inputs(5 + 9 * n, layer.gate_up.dtype, seed=n) for n, layer in enumerate(layers)]
    want = [ops.moe(*i, e) for i, e in zip(inputs, experts, strict=True)]
    wrong = []

    def call(n: int) -> None:
        for _ in range(30):
            if not torch.equal(ops.moe(*inputs[n], experts[n]), want[n]):
                wrong.append(n)

    callers = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


# ---- inputs of all kinds ----------------------------------------------------------------------------------------


def test_no_tokens():
    out = ops.moe(*random_inputs(0, torch.bfloat16), random_layer(torch.bfloat16).pack())
    assert out.shape == (0, HIDDEN) and out.dtype == torch.bfloat16


def test_ids_of_num_experts_or_more_are_skipped():
    layer = random_layer()
    x, ids, weights = random_inputs(6)
    ids[0, 0], ids[1, 1], ids[2] = EXPERTS, 2**40, EXPERTS + 1
    weights[1, 1] = math.nan  # of a skipped slot
    got = ops.moe(x, ids, weights, layer.pack())
    weights[1, 1] = 0
    assert_reduction(got, layer.reference(x, ids, weights))
    assert (got[2] == 0).all()


def test_an_expert_may_be_chosen_twice():
    layer = random_layer()
    x, ids, weights = random_inputs(6)
    ids[:, 1] = ids[:, 0]
    assert_reduction(ops.moe(x, ids, weights, layer.pack()), layer.reference(x, ids, weights))


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=name_of)
def test_dtypes_of_the_routing(ids_dtype, weights_dtype):
    layer = random_layer()
    x, ids, weights = random_inputs(6)
    inputs = (x, ids.to(ids_dtype), weights.to(weights_dtype))
    assert_reduction(ops.moe(*inputs, layer.pack()), layer.reference(*inputs))


def test_tensors_need_not_be_contiguous():
    experts = random_layer().pack()
    x, ids, weights = random_inputs(11)
    want = ops.moe(x, ids, weights, experts)
    hidden = {
        "transposed": x.T.contiguous().T,
        "every other column": torch.stack([x, x * 0 + math.nan], 2).flatten(1)[:, ::2],
        "with gaps": torch.cat([x, torch.full((11, 5), math.nan)], 1)[:, :HIDDEN],
        "with an offset": torch.cat([torch.full((2, HIDDEN), math.nan), x])[2:],
    }
    for name, view in hidden.items():
        assert_exact(ops.moe(view, ids, weights, experts), want, name)
        assert ops.moe(view, ids, weights, experts).is_contiguous()
    assert_exact(ops.moe(x, ids.T.contiguous().T, weights, experts), want, "ids")
    assert_exact(ops.moe(x, ids, weights.T.contiguous().T, experts), want, "weights")
    one = ops.moe(x[:1].expand(4, -1), ids[:1].expand(4, -1), weights[:1].expand(4, -1), experts)
    assert_exact(one, want[:1].expand(4, -1), "expanded")


def test_weights_need_not_be_contiguous():
    layer = random_layer(bias=True)
    inputs = random_inputs(5)
    want = ops.moe(*inputs, layer.pack())
    gate_up, down = (torch.cat([w, w * math.nan], 2)[:, :, : w.shape[2]] for w in layer.weights[:2])
    biases = [torch.stack([b, b * math.nan], 2)[:, :, 0] for b in layer.weights[2:]]
    packed = ops.pack_experts(gate_up, down, "auto", layer.spec.activation, *biases)
    assert_exact(ops.moe(*inputs, packed), want)
    every_other = ops.pack_experts(gate_up[::2], down[::2], "auto", layer.spec.activation, *(b[::2] for b in biases))
    ids = inputs[1] // 2
    assert_exact(
        ops.moe(inputs[0], ids, inputs[2], every_other),
        ops.moe(inputs[0], ids * 2, inputs[2], layer.pack()),
        "every other expert",
    )


def test_inputs_are_left_as_they_are():
    inputs = random_inputs(5)
    before = [t.clone() for t in inputs]
    ops.moe(*inputs, random_layer().pack())
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def test_weights_are_read_not_kept():
    layer = random_layer()
    experts = layer.pack()
    inputs = random_inputs(5)
    want = ops.moe(*inputs, experts)
    layer.gate_up.fill_(math.nan)
    assert_exact(ops.moe(*inputs, experts), want)


def test_unpacking_gives_the_source():
    for n, (dtype, (interleaved, transposed)) in enumerate(itertools.product(DTYPES, LAYOUTS)):
        layer = random_layer(dtype, interleaved=interleaved, transposed=transposed, seed=n)
        gate_up, down = torch.full_like(layer.gate_up, math.nan), torch.full_like(layer.down, math.nan)
        layer.pack().unpack_into(gate_up, down)
        assert_exact(gate_up, layer.gate_up)
        assert_exact(down, layer.down)


def test_facts_about_packed_experts():
    experts = random_layer(torch.bfloat16).pack()
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
    )
    assert experts.format.name == "bf16" and experts.isa == machine().isa
    assert experts.nbytes >= 3 * EXPERTS * HIDDEN * INTERMEDIATE * 2
    assert "bf16" in repr(experts) and "72" in repr(experts)


# ---- torch ------------------------------------------------------------------------------------------------------


def test_kt_moe_is_a_good_operator():
    experts = random_layer().pack()
    torch.library.opcheck(torch.ops.kt.moe.default, (*random_inputs(6), experts.handle))


def test_kt_experts_is_a_good_operator():
    for bias in (False, True):
        layer = random_layer(bias=bias)
        torch.library.opcheck(torch.ops.kt.experts.default, (*random_inputs(6), *layer.weights, layer.spec.encode()))


def test_kt_experts_equals_kt_moe():
    layer = random_layer(bias=True)
    inputs = random_inputs(6)
    got = torch.ops.kt.experts(*inputs, *layer.weights, layer.spec.encode())
    assert_exact(got, ops.moe(*inputs, layer.pack()))


def test_meta_tensors_have_shapes_only():
    inputs = [t.to("meta") for t in random_inputs(6)]
    out = torch.ops.kt.moe(*inputs, torch.zeros(1, dtype=torch.int64, device="meta"))
    assert out.is_meta and out.shape == (6, HIDDEN)


def test_gradients_are_refused_with_a_reason():
    x, ids, weights = random_inputs(3)
    out = ops.moe(x.requires_grad_(), ids, weights, random_layer().pack())
    with pytest.raises(NotImplementedError, match="no backward"):
        out.sum().backward()
    with torch.inference_mode():
        ops.moe(x, ids, weights, random_layer().pack())


def test_the_handle_of_freed_experts_raises():
    experts = random_layer().pack()
    handle = experts.handle.clone()
    inputs = random_inputs(3)
    torch.ops.kt.moe(*inputs, handle)
    del experts
    gc.collect()
    with pytest.raises(ValueError, match=f"no packed experts have the handle {int(handle)}"):
        torch.ops.kt.moe(*inputs, handle)


# ---- what cannot be used ----------------------------------------------------------------------------------------


def changed(tensor: torch.Tensor, at: tuple[int, int], value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


X, IDS, WEIGHTS = random_inputs(4)
BAD_CALLS = {
    "hidden of another width": ((X[:, :70], IDS, WEIGHTS), "[4, 70]"),
    "hidden with three dimensions": ((X[None], IDS, WEIGHTS), "[1, 4, 72]"),
    "hidden with one dimension": ((X[0], IDS, WEIGHTS), "[72]"),
    "fewer ids than tokens": ((X, IDS[:3], WEIGHTS), "[3, 3]"),
    "ids with one dimension": ((X, IDS[:, 0], WEIGHTS), "[4]"),
    "no slots": ((X, IDS[:, :0], WEIGHTS[:, :0]), "[4, 0]"),
    "weights of another shape": ((X, IDS, WEIGHTS[:, :2]), "[4, 2]"),
    "hidden in float64": ((X.double(), IDS, WEIGHTS), "torch.float64"),
    "hidden of integers": ((X.int(), IDS, WEIGHTS), "torch.int32"),
    "weights in float64": ((X, IDS, WEIGHTS.double()), "torch.float64"),
    "ids in int16": ((X, IDS.short(), WEIGHTS), "torch.int16"),
    "ids in fp32": ((X, IDS.float(), WEIGHTS), "torch.float32"),
    "a negative id": ((X, changed(IDS, (2, 1), -3), WEIGHTS), "topk_ids[2, 1] is -3"),
    "a negative int32 id": ((X, changed(IDS, (3, 0), -1).int(), WEIGHTS), "topk_ids[3, 0] is -1"),
    "a NaN weight": ((X, IDS, changed(WEIGHTS, (1, 2), math.nan)), "topk_weights[1, 2] is nan"),
    "an infinite weight": ((X, IDS, changed(WEIGHTS, (0, 0), math.inf)), "topk_weights[0, 0] is inf"),
    "minus infinity in bf16": (
        (X, IDS, changed(WEIGHTS, (0, 1), -math.inf).bfloat16()),
        "topk_weights[0, 1] is -inf",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_raises_and_names_the_value(case):
    inputs, text = BAD_CALLS[case]
    experts = random_layer().pack()
    with pytest.raises(ValueError, match=re.escape(text)):
        ops.moe(*inputs, experts)
    assert_exact(ops.moe(X, IDS, WEIGHTS, experts), ops.moe(X, IDS, WEIGHTS, random_layer().pack()))


L = random_layer(bias=True)
BAD_LAYERS = {
    "two dimensions": ((L.gate_up[0], L.down), {}, "[112, 72]"),
    "down that does not fit": ((L.gate_up, L.down[:, :70]), {}, "[5, 70, 56]"),
    "another number of experts": ((L.gate_up[:4], L.down), {}, "[4, 112, 72]"),
    "not transposed": ((L.gate_up, L.down), {"transposed": True}, "[5, 112, 72]"),
    "not gated": ((L.gate_up, L.down), {"activation": Activation("relu", gated=False)}, "[5, 56, 72]"),
    "no experts": ((L.gate_up[:0], L.down[:0]), {}, "[0, 72, 56]"),
    "float64": ((L.gate_up.double(), L.down.double()), {}, "torch.float64"),
    "float64 into bf16": ((L.gate_up.double(), L.down.double()), {"weight_format": "bf16"}, "torch.float64"),
    "two dtypes": ((L.gate_up, L.down.half()), {}, "torch.float16"),
    "meta": ((L.gate_up.to("meta"), L.down.to("meta")), {}, "meta"),
    "a gate_up_bias alone": ((L.gate_up, L.down), {"gate_up_bias": L.gate_up_bias}, "down_bias"),
    "a down_bias alone": ((L.gate_up, L.down), {"down_bias": L.down_bias}, "gate_up_bias"),
    "a short bias": (
        (L.gate_up, L.down),
        {"gate_up_bias": L.gate_up_bias[:, :56], "down_bias": L.down_bias},
        "[5, 56]",
    ),
    "biases of two dtypes": (
        (L.gate_up, L.down),
        {"gate_up_bias": L.gate_up_bias, "down_bias": L.down_bias.half()},
        "torch.float16",
    ),
    "unknown activation": ((L.gate_up, L.down), {"activation": "tanhshrink"}, "'tanhshrink'"),
    "unknown format": ((L.gate_up, L.down), {"weight_format": "int3"}, "'int3'"),
    "unknown ISA": ((L.gate_up, L.down), {"isa": "mmx"}, "'mmx'"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_a_bad_layer_raises_and_names_the_value(case):
    weights, arguments, text = BAD_LAYERS[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        ops.pack_experts(*weights, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "swigluoai", "gated": False},
        {"limit": 1.0, "gated": False},
        {"limit": -0.5},
        {"limit": math.nan},
        {"kind": "swigluoai", "alpha": math.nan},
    ],
    ids=str,
)
def test_an_activation_that_makes_no_sense_raises(arguments):
    with pytest.raises(ValueError):
        Activation(**arguments)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None], ids=repr)
def test_a_bad_number_of_threads_raises(count, threads):
    with pytest.raises(ValueError, match=re.escape(repr(count))):
        threads(count)


# ---- processes --------------------------------------------------------------------------------------------------

SET_UP = """
import os, threading, time, torch, ktcompile
torch.manual_seed(0)
ktcompile.set_num_threads(3)
experts = ktcompile.ops.pack_experts(torch.randn(4, 64, 48), torch.randn(4, 48, 32))
inputs = torch.randn(9, 48), torch.randint(4, (9, 2)), torch.rand(9, 2)
want = ktcompile.ops.moe(*inputs, experts)
"""


def test_a_forked_child_computes():
    run_python(
        SET_UP
        + """
def busy():
    while not done.is_set():
        ktcompile.ops.moe(*inputs, experts)

done = threading.Event()
thread = threading.Thread(target=busy)
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        right = torch.equal(ktcompile.ops.moe(*inputs, experts), want)
        ktcompile.set_num_threads(2)
        right = right and torch.equal(ktcompile.ops.moe(*inputs, experts), want)
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
done.set()
thread.join()
assert torch.equal(ktcompile.ops.moe(*inputs, experts), want)
""",
        timeout=60,
    )


def test_idle_threads_take_no_time():
    run_python(
        SET_UP
        + """
time.sleep(0.1)
begin = time.process_time()
time.sleep(0.5)
used = time.process_time() - begin
assert used < 0.01, f"{used * 1e3:.1f} ms of processor time in half a second of nothing"
"""
    )


def test_the_number_of_threads_is_that_of_the_environment():
    program = "import ktcompile; print(ktcompile.get_num_threads())"
    assert run_python(program, env={"KTCOMPILE_NUM_THREADS": "3"}).strip() == "3"
