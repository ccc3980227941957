"""`ops.pack_experts` and `ops.moe`: right on every kernel, the same bits whatever the batch, threads and ISA, and
plain errors for what cannot be used."""

from __future__ import annotations

import gc
import itertools
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction, assert_rounding, relative_error
from helpers.layers import DTYPES, EXPERTS, HIDDEN, INTERMEDIATE, random_inputs, random_layer
from helpers.processes import run_python

from ktcompile import _native, ops
from ktcompile.machine import machine
from ktcompile.ops import Activation, PackedExperts
from ktcompile.quant import FORMATS, QuantizedWeight

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
ISAS = machine().isas
QUANTISED = [name for name, f in FORMATS.items() if f.codec is not None]
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


def assert_right(got: torch.Tensor, wanted: torch.Tensor, weight_format: str, what: str) -> None:
    """Fail unless `got` is what the format makes of the layer, where `wanted` is in fp64."""
    if FORMATS[weight_format].dynamic:
        # A code of an activated row that lies between two integers may go either way; native_tests allow for no more.
        assert relative_error(got, wanted) < 1e-2, what
    else:
        assert_reduction(got, wanted, what)


def order_of_sums(isa: str, weight_format: str, dtype: torch.dtype) -> bool:
    """Return what, beside the arguments, decides on the bits of a result: whether floats are summed on tiles."""
    floats = weight_format in ("fp32", "fp16") or FORMATS[weight_format].dynamic
    return dtype == torch.bfloat16 and not floats and _native.sums_on_tiles(isa)


def on_every_isa(experts: PackedExperts, inputs: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the results of all instruction sets, for which weights are packed alike."""
    for experts.isa in ISAS:
        yield experts.isa, ops.moe(*inputs, experts)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_isa_gives_the_bits_of_one_and_those_are_right(weight_format):
    """For rows of every dtype; weights are packed, and quantised for the right result, once for all."""
    cases = list(itertools.product(ACTIVATIONS, LAYOUTS))
    for n, (activation, (interleaved, transposed)) in enumerate(cases):
        # All of them for the formats of floats; each activation and each layout for the others, which take longer.
        if FORMATS[weight_format].codec is not None and n % 5 != 0:
            continue
        kinds = {"interleaved": interleaved, "transposed": transposed, "bias": n % 2 == 0}
        layer = random_layer(DTYPES[n % 3], activation, weight_format, seed=n, **kinds)
        experts = layer.pack()
        rows = [random_inputs(7, dtype, seed=n) for dtype in DTYPES]
        for dtype, inputs, wanted in zip(DTYPES, rows, layer.references(rows), strict=True):
            first = {}
            for isa, got in on_every_isa(experts, inputs):
                what = f"{isa}, {name_of(dtype)}, {activation}, {kinds}"
                assert_right(got, wanted, weight_format, what)
                assert_exact(got, first.setdefault(order_of_sums(isa, weight_format, dtype), got), what)


# (E, H, I): no size is a multiple of a group, of a panel or of what a kernel takes at once.
SIZES = ((1, 1, 1), (1, 33, 17), (5, 2, 1), (3, 1, 40), (64, 16, 8), (2, 290, 130), (3, 161, 65))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_awkward_sizes(weight_format, sizes):
    for dtype in (torch.float32, torch.bfloat16):
        layer = random_layer(dtype, weight_format=weight_format, bias=True, sizes=sizes)
        inputs = random_inputs(9, dtype, sizes=sizes, top_k=min(3, sizes[0]))
        wanted, first = layer.reference(*inputs), {}
        for isa, got in on_every_isa(layer.pack(), inputs):
            assert_right(got, wanted, weight_format, f"{isa}, {name_of(dtype)}")
            assert_exact(got, first.setdefault(order_of_sums(isa, weight_format, dtype), got), isa)


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


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_depends_neither_on_its_batch_nor_on_threads(isa, weight_format, threads):
    # Emulated tiles are slow.
    count = 70 if isa == "amx_emu" else 300
    for dtype in DTYPES if FORMATS[weight_format].codec is None else (torch.bfloat16,):
        experts = random_layer(dtype, weight_format=weight_format, bias=True).pack(isa)
        x, ids, weights = random_inputs(count, dtype)
        threads(1)
        alone = torch.cat([ops.moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], experts) for t in range(count)])
        for number in (1, 2, 5):
            threads(number)
            for tokens in {1, 2, 7, 64, count}:
                part = slice(count - tokens, count)
                got = ops.moe(x[part], ids[part], weights[part], experts)
                assert_exact(got, alone[part], f"{name_of(dtype)}, {tokens} tokens on {number} threads")


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_row_does_not_depend_on_the_values_of_others(weight_format):
    experts = random_layer(weight_format=weight_format).pack()
    odd = (3, 8, 11)
    others = [t for t in range(20) if t not in odd]
    for dtype in (torch.float32, torch.bfloat16):
        x, ids, weights = random_inputs(20, dtype)
        inputs = x.clone(), ids, weights
        inputs[0][3, 5], inputs[0][8], inputs[0][11] = math.nan, math.inf, 3e38
        results = on_every_isa(experts, (x, ids, weights)), on_every_isa(experts, inputs)
        for (isa, want), (_, got) in zip(*map(list, results), strict=True):
            assert_exact(got[others], want[others], isa)
            assert got[3].isnan().all(), isa
            assert not FORMATS[weight_format].dynamic or got[8].isnan().all(), isa


def test_experts_count_their_tokens():
    experts = random_layer().pack()
    ops.moe(*random_inputs(1), experts)  # the first call is checked, by calls that count too
    wanted = torch.tensor(experts.native.tokens)
    for tokens in (1, 20):
        x, ids, weights = random_inputs(tokens)
        ops.moe(x, ids, weights, experts)
        wanted += ids[ids < EXPERTS].bincount(minlength=EXPERTS)
    assert experts.native.tokens == wanted.tolist()


def test_slots_may_come_in_any_order():
    experts = random_layer().pack()
    x, ids, weights = random_inputs(20)
    order = torch.tensor([2, 0, 1])
    assert_exact(ops.moe(x, ids[:, order], weights[:, order], experts), ops.moe(x, ids, weights, experts))


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


# ---- quantised weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", QUANTISED)
def test_quantised_weights_are_packed_as_they_are(weight_format):
    layer = random_layer(torch.bfloat16, weight_format=weight_format, bias=True, sizes=(3, 161, 65))
    codes = [FORMATS[weight_format].quantize(w) for w in (layer.gate_up, layer.down)]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = random_inputs(9, dtype, sizes=(3, 161, 65))
        want = ops.moe(*inputs, layer.pack())
        for given in ("auto", weight_format):
            packed = ops.pack_experts(*codes, given, layer.spec.activation, *layer.weights[2:])
            assert packed.format.name == weight_format
            assert_exact(ops.moe(*inputs, packed), want, given)


@pytest.mark.parametrize("weight_format", QUANTISED)
def test_unpacking_dequantises(weight_format):
    for n, (dtype, (interleaved, transposed)) in enumerate(itertools.product(DTYPES, LAYOUTS)):
        kinds = {"interleaved": interleaved, "transposed": transposed, "sizes": (2, 161, 65)}
        layer = random_layer(dtype, weight_format=weight_format, seed=n, **kinds)
        wanted = [layer.stored(w).to(dtype) for w in (layer.gate_up, layer.down)]
        got = [torch.full_like(w, math.nan) for w in (layer.gate_up, layer.down)]
        layer.pack().unpack_into(*got)
        for ours, right in zip(got, wanted, strict=True):
            assert_exact(ours, right, f"{name_of(dtype)}, {kinds}")


@pytest.mark.parametrize("weight_format", QUANTISED)
def test_codes_may_have_any_strides(weight_format):
    layer = random_layer(weight_format=weight_format)
    codes = [FORMATS[weight_format].quantize(w) for w in (layer.gate_up, layer.down)]

    def spread(tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return the tensor with its last two dimensions transposed in memory, and with other values between."""
        if tensor is None:
            return None
        return torch.stack([tensor.mT, torch.full_like(tensor.mT, 77)], 3).flatten(2)[:, :, ::2].mT

    awkward = [replace(q, codes=spread(q.codes), scales=spread(q.scales), zeros=spread(q.zeros)) for q in codes]
    inputs = random_inputs(5)
    assert_exact(ops.moe(*inputs, ops.pack_experts(*awkward)), ops.moe(*inputs, ops.pack_experts(*codes)))


@pytest.mark.parametrize("weight_format", QUANTISED)
def test_weights_that_need_gradients_are_packed(weight_format):
    layer = random_layer(weight_format=weight_format)
    parameters = [torch.nn.Parameter(w) for w in (layer.gate_up, layer.down)]
    inputs = random_inputs(5)
    assert_exact(ops.moe(*inputs, ops.pack_experts(*parameters, weight_format)), ops.moe(*inputs, layer.pack()))


def test_scales_of_int4_may_be_those_of_fp16():
    layer = random_layer(weight_format="int4_g32")
    codes = [FORMATS["int4_g32"].quantize(w) for w in (layer.gate_up, layer.down)]
    fine = [replace(q, scales=(q.scales * 1.0009765625).half().float()) for q in codes]
    assert any((q.scales.bfloat16() != q.scales).any() for q in fine)
    got = [torch.empty_like(w) for w in (layer.gate_up, layer.down)]
    ops.pack_experts(*fine).unpack_into(*got)
    for ours, q in zip(got, fine, strict=True):
        assert_exact(ours, q.dequantize())


# ---- facts ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=lambda f: f.name)
def test_memory_of_packed_experts(weight_format):
    sizes = (2, 512, 256)
    experts = random_layer(weight_format=weight_format.name, sizes=sizes).pack()
    # Scales of a whole row are not in `bytes_per_weight`; memory comes in pages.
    rows = 0 if weight_format.group_size else 8 * sizes[0] * (2 * sizes[2] + sizes[1])
    expected = 3 * math.prod(sizes) * weight_format.bytes_per_weight + rows
    assert expected - rows <= experts.nbytes <= expected + 2 * 4096


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


def changed(tensor: torch.Tensor, at: tuple[int, ...], value: float) -> torch.Tensor:
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
INT8 = FORMATS["int8"].quantize(L.gate_up), FORMATS["int8"].quantize(L.down)
FP8, INT4_ZP = ([FORMATS[name].quantize(w) for w in (L.gate_up, L.down)] for name in ("fp8", "int4_g32_zp"))
INT4, MXFP4 = FORMATS["int4_g32"].quantize(L.down), FORMATS["mxfp4"].quantize(L.down)


def scaled(weight_format: str, factor: float, weight: torch.Tensor = L.gate_up) -> QuantizedWeight:
    """Return codes of a weight with all scales `factor` times as large."""
    q = FORMATS[weight_format].quantize(weight)
    return replace(q, scales=q.scales * factor)


def with_code(q: QuantizedWeight, code: int, column: int = 70) -> QuantizedWeight:
    return replace(q, codes=changed(q.codes, (3, 7, column), code))


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
    "unknown format of floats": ((L.gate_up, L.down), {"weight_format": "float32"}, "'float32'"),
    "unknown group": ((L.gate_up, L.down), {"weight_format": "int4_g48"}, "'int4_g48'"),
    "unknown ISA": ((L.gate_up, L.down), {"isa": "mmx"}, "'mmx'"),
    "NaN in int8": ((changed(L.gate_up, (1, 2, 3), math.nan), L.down), {"weight_format": "int8"}, "expert 1 has nan"),
    "infinity in int4": (
        (L.gate_up, changed(L.down, (4, 2, 3), -math.inf)),
        {"weight_format": "int4_g32"},
        "down_proj of expert 4 has -inf",
    ),
    "more than fp8 can scale": ((L.gate_up * 2.0**127, L.down), {"weight_format": "fp8"}, "at most 2**120"),
    "codes of two formats": ((INT8[0], MXFP4), {}, "gate_up_proj is int8 and down_proj is mxfp4"),
    "codes and floats": ((INT8[0], L.down), {}, "gate_up_proj is int8 and down_proj is torch.float32"),
    "floats and codes": ((L.gate_up, INT8[1]), {}, "gate_up_proj is torch.float32 and down_proj is int8"),
    "codes of another format": (INT8, {"weight_format": "fp8"}, "'fp8', but the weights are quantised as int8"),
    "transposed codes": (INT8, {"transposed": True}, "cannot be transposed"),
    "codes that do not fit": (INT8[::-1], {}, "[5, 112, 72]"),
    "scales that 16 bits do not hold": ((scaled("int4_g32", 1 + 2.0**-20), INT4), {}, "of int4_g32 must be exact"),
    "scales of bf16 and of fp16": (
        (scaled("int4_g32", 2.0**-40), scaled("int4_g32", 1 + 2.0**-10, L.down)),
        {},
        "exact in bf16, or in fp16, for both weights",
    ),
    "a scale of mxfp4 that is no power of two": ((scaled("mxfp4", 1.5), MXFP4), {}, "needs a power of two"),
    "a code of int8 without an opposite": ((with_code(INT8[0], -128), INT8[1]), {}, "row 7, column 70 is -128"),
    "a NaN code": ((with_code(FP8[0], 0xFF), FP8[1]), {}, "expert 3, row 7, column 70 is 255"),
    "a code of five bits": ((INT4_ZP[0], with_code(INT4_ZP[1], 16, 50)), {}, "expert 3, row 7, column 50 is 16"),
    "a zero point of five bits": (
        (INT4_ZP[0], replace(INT4_ZP[1], zeros=changed(INT4_ZP[1].zeros, (3, 7, 1), 16))),
        {},
        "the zero point of expert 3, row 7, group 1 is 16; it must be from 0 to 15",
    ),
    "a NaN scale": ((scaled("int8", math.nan), INT8[1]), {}, "expert 0, row 0, group 0 is nan"),
    "an infinite scale": ((scaled("fp8", math.inf), FORMATS["fp8"].quantize(L.down)), {}, "group 0 is inf"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_a_bad_layer_raises_and_names_the_value(case):
    weights, arguments, text = BAD_LAYERS[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        ops.pack_experts(*weights, **arguments)


@pytest.mark.parametrize(
    ("layout", "group", "scale", "zero_points", "text"),
    [
        ("int8", 128, "f32", False, "no int8 with group 128, scales f32 and no zero points: int8 has group 0,"),
        ("int8_dyn", 0, "bf16", False, "int8_dyn has group 0, scales f32 and"),
        ("fp8", 48, "f32", False, "no fp8 with group 48,"),
        ("fp8", 128, "f32", True, "scales f32 and zero points: fp8 has group 0, 32, 64 or 128,"),
        ("int4", 0, "bf16", False, "int4 and int4_dyn have group 32, 64 or 128,"),
        ("int4_dyn", 32, "f32", True, "int4 and int4_dyn have group 32, 64 or 128, scales f16 or bf16,"),
        ("mxfp4", 32, "bf16", False, "mxfp4 has group 32, scales e8m0"),
        ("mxfp4", 64, "e8m0", False, "no mxfp4 with group 64,"),
        ("bf16", 0, "f32", False, "no bf16 with group 0, scales f32 and no zero points: floats have"),
        ("f32", 32, "none", False, "no f32 with group 32,"),
    ],
)
def test_a_format_that_the_kernels_do_not_have_raises(layout, group, scale, zero_points, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        _native.Format(getattr(_native.Layout, layout), group, getattr(_native.ScaleType, scale), zero_points)


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
