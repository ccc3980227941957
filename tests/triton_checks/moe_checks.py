"""`ops.triton.moe` against plain torch. `test_triton_kernels.py` runs this file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction, relative_error
from helpers.triton_device import DEVICE, in_poison
from torch import Tensor

from ktcompile.ops import Activation, ExpertsSpec, reference
from ktcompile.ops.triton import DeviceExperts, Products, Routing, device_experts, moe, route, routing_reference
from ktcompile.ops.triton.routing import CHUNK, MANY_PAIRS, max_blocks
from ktcompile.quant import FORMATS, QuantizedWeight

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 136, 40, 2
SILU = Activation("silu")
QUANTISED = [n for n, f in FORMATS.items() if f.layout in ("int8", "int4", "fp8", "mxfp4")]
ACTIVATIONS = (
    *(Activation(k, g) for k in ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2") for g in (True, False)),
    Activation("gelu_tanh", limit=0.5),
    Activation("swigluoai", alpha=1.702, limit=0.7),
    Activation("swigluoai", alpha=1.3),
)
ALL_RESIDENT = torch.arange(EXPERTS, dtype=torch.int32)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, so that a row which no kernel wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Layer:
    """A random layer: what the device has, and the same in plain torch."""

    def __init__(
        self,
        weight_format: str = "fp32",
        activation: Activation = SILU,
        *,
        sizes: tuple[int, int, int] = (EXPERTS, HIDDEN, INTERMEDIATE),
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
    ) -> None:
        experts, hidden, intermediate = sizes
        generator = torch.Generator().manual_seed(0)
        rows = intermediate * (2 if activation.gated else 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

        self.spec = ExpertsSpec(activation, interleaved)
        self.weights = [
            self._stored(normal(experts, *s), weight_format) for s in ((rows, hidden), (hidden, intermediate))
        ]
        self.biases = [normal(experts, rows), normal(experts, hidden)] if bias else [None, None]
        self.transposed = transposed

    @staticmethod
    def _stored(weight: Tensor, weight_format: str) -> Tensor | QuantizedWeight:
        record = FORMATS[weight_format]
        return weight.to(record.storage) if record.storage else record.quantize(weight)

    def on_device(self, resident: Tensor = ALL_RESIDENT) -> DeviceExperts:
        """Return the experts for which `resident` has a place, in its order."""
        count = int(resident.max()) + 1 if len(resident) else 0
        chosen = [int((resident == place).nonzero()[0]) for place in range(count)]
        weights = [self._select(w, chosen) for w in self.weights]
        biases = [b if b is None else b[chosen] for b in self.biases]
        activation, interleaved = self.spec.activation, self.spec.interleaved
        return device_experts(*weights, activation, *biases, interleaved=interleaved, device=DEVICE)

    def _select(self, weight: Tensor | QuantizedWeight, chosen: list[int]) -> Tensor | QuantizedWeight:
        if isinstance(weight, QuantizedWeight):
            zeros = None if weight.zeros is None else weight.zeros[chosen]
            return QuantizedWeight(weight.format, weight.codes[chosen], weight.scales[chosen], zeros)
        return in_poison(weight[chosen].mT).mT if self.transposed else in_poison(weight[chosen])

    def wanted(self, x: Tensor, ids: Tensor, weights: Tensor, resident: Tensor = ALL_RESIDENT) -> Tensor:
        """Return the right result in fp64: slots without a resident expert are skipped."""
        known = torch.where((ids >= 0) & (ids < len(resident)), ids, 0)
        ids = torch.where((resident[known] >= 0) & (known == ids), ids, EXPERTS)
        plain = [w if isinstance(w, Tensor) else w.dequantize() for w in self.weights]
        return reference.moe(x, ids, weights, *plain, self.spec, *self.biases)


def inputs(tokens: int, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    return x, ids, torch.rand(tokens, TOP_K, generator=generator)


def run(experts: DeviceExperts, x: Tensor, ids: Tensor, weights: Tensor, resident: Tensor = ALL_RESIDENT) -> Tensor:
    return moe(in_poison(x), ids.to(DEVICE), weights.to(DEVICE), experts, resident.to(DEVICE)).cpu()


@pytest.mark.parametrize("tokens", [1, 2, 150])
def test_right_for_any_number_of_tokens(tokens: int) -> None:
    layer = Layer(bias=True)
    assert_reduction(run(layer.on_device(), *inputs(tokens)), layer.wanted(*inputs(tokens)))


def test_no_tokens_or_no_slots_give_zeros() -> None:
    experts, (x, ids, weights) = Layer().on_device(), inputs(2)
    assert run(experts, *inputs(0)).shape == (0, HIDDEN)
    assert_exact(run(experts, x, ids[:, :0], weights[:, :0]), torch.zeros(2, HIDDEN))


@pytest.mark.parametrize("weight_format", QUANTISED)
def test_right_for_every_format(weight_format: str) -> None:
    layer = Layer(weight_format)
    assert_reduction(run(layer.on_device(), *inputs(2)), layer.wanted(*inputs(2)))


@pytest.mark.parametrize("weight_format", ["int4_g128_zp", "fp8", "mxfp4"])
@pytest.mark.parametrize("sizes", [(1, 1), (33, 31), (64, 129)])
def test_right_for_awkward_sizes(weight_format: str, sizes: tuple[int, int]) -> None:
    layer = Layer(weight_format, sizes=(EXPERTS, *sizes))
    given = inputs(2, hidden=sizes[0])
    assert_reduction(run(layer.on_device(), *given), layer.wanted(*given))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_right_for_every_activation(activation: Activation) -> None:
    layer = Layer(activation=activation, bias=True)
    assert_reduction(run(layer.on_device(), *inputs(3)), layer.wanted(*inputs(3)))


@pytest.mark.parametrize(("interleaved", "transposed"), [*itertools.product((False, True), repeat=2)])
def test_right_for_every_layout(interleaved: bool, transposed: bool) -> None:
    layer = Layer(interleaved=interleaved, transposed=transposed, bias=True)
    assert_reduction(run(layer.on_device(), *inputs(3)), layer.wanted(*inputs(3)))


@pytest.mark.parametrize(("dtype", "weight_format"), [
    (torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.bfloat16, "int4_g32"), (torch.float16, "int4_g32_zp"),
    (torch.bfloat16, "fp8"), (torch.float16, "mxfp4"),
])  # fmt: skip
def test_right_in_short_dtypes(dtype: torch.dtype, weight_format: str) -> None:
    layer, given = Layer(weight_format), inputs(2, dtype)
    got = run(layer.on_device(), *given)
    assert got.dtype == dtype
    assert relative_error(got, layer.wanted(*given)) < 1.2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "resident", [[-1] * 6, [-1, -1, 0, -1, -1, -1], [2, -1, 0, -1, 1, -1], [5, 3, 1, 0, 2, 4]], ids=str
)
def test_only_resident_experts_count(resident: list[int]) -> None:
    places = torch.tensor(resident, dtype=torch.int32)
    layer = Layer("int4_g32", bias=True)
    got = run(layer.on_device(places), *inputs(9), places)
    wanted = layer.wanted(*inputs(9), places)
    assert_reduction(got, wanted) if wanted.any() else assert_exact(got, torch.zeros_like(got))


def test_ids_and_places_that_do_not_exist_are_skipped() -> None:
    layer, (x, ids, weights) = Layer(), inputs(9)
    ids[0], ids[1, 1], ids[2, 0] = EXPERTS, -1, 1 << 40
    experts = layer.on_device()
    assert_reduction(run(experts, x, ids, weights), layer.wanted(x, ids, weights))
    places = torch.tensor([0, 1, 2, 3, EXPERTS, 1 << 30], dtype=torch.int32)
    known = torch.tensor([0, 1, 2, 3, -1, -1], dtype=torch.int32)
    assert_exact(run(experts, x, ids, weights, places), run(experts, x, ids, weights, known))


def test_a_result_does_not_depend_on_the_batch_or_the_placement() -> None:
    layer, (x, ids, weights) = Layer("int4_g32_zp"), inputs(67)
    ids[:] = ids[0]
    whole = run(layer.on_device(), x, ids, weights)
    for at in (slice(0, 1), slice(63, 67)):
        assert_exact(run(layer.on_device(), x[at], ids[at], weights[at]), whole[at])
    places = torch.tensor([5, 3, 1, 0, 2, 4], dtype=torch.int32)
    assert_exact(run(layer.on_device(places), x[:1], ids[:1], weights[:1], places), whole[:1])


def test_the_same_expert_twice_counts_twice() -> None:
    layer, (x, ids, weights) = Layer(), inputs(3)
    ids[:, 1] = ids[:, 0]
    assert_reduction(run(layer.on_device(), x, ids, weights), layer.wanted(x, ids, weights))


def test_blocks_cover_every_resident_pair_once() -> None:
    for tokens, block_rows in itertools.product((1, 5, 40), (1, 4, 16)):
        ids = inputs(tokens)[1].to(DEVICE)
        places = torch.tensor([1, -1, 0, 2, -1, 3], dtype=torch.int32, device=DEVICE)
        routing = route(ids, places, 4, block_rows)
        rows = []
        for place, begin, end in routing.blocks.tolist():
            assert (end > begin) == (place >= 0) and end - begin <= block_rows
            assert all(routing.resident[p] == place for p in routing.order[begin:end])
            rows += range(begin, end)
        assert rows == list(range(int((routing.resident >= 0).sum())))
        assert sorted(routing.order.tolist()) == list(range(ids.numel()))


def random_ids(tokens: int, top_k: int, experts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return ids of which some are of no expert."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 2, (tokens, top_k), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.02] = (1 << 40) if dtype == torch.int64 else (1 << 31) - 1
    return ids.to(dtype).to(DEVICE)


def random_places(experts: int, num_resident: int) -> Tensor:
    """Return places of which some are of no expert."""
    generator = torch.Generator().manual_seed(experts)
    return torch.randint(-2, num_resident + 2, (experts,), generator=generator, dtype=torch.int32).to(DEVICE)


def assert_same_routing(got: Routing, wanted: Routing) -> None:
    for name in ("order", "resident", "blocks"):
        assert getattr(got, name).dtype == torch.int32
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [0, 1, 6, 128, 257, 512])
@pytest.mark.parametrize("tokens", [0, 1, CHUNK // 8])
def test_the_routing_of_one_chunk_is_that_of_plain_torch(tokens: int, experts: int, dtype: torch.dtype) -> None:
    arguments = (random_ids(tokens, 8, experts, dtype), random_places(experts, 40), 40, 4)
    assert_same_routing(route(*arguments), routing_reference.route(*arguments))


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [
    (CHUNK + 1, 1, 512), (CHUNK + 1, 1, 6), (2 * CHUNK, 1, 100), (5 * CHUNK, 2, 257), (999, 7, 100),
    (MANY_PAIRS - 1, 1, 60), (MANY_PAIRS, 1, 60), (MANY_PAIRS + 1, 1, 6),
    pytest.param(8192, 10, 512, marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="minutes in the interpreter")),
])  # fmt: skip
def test_the_routing_of_many_chunks_is_that_of_plain_torch(tokens: int, top_k: int, experts: int) -> None:
    arguments = (random_ids(tokens, top_k, experts), random_places(experts, 700), 700, 64)
    assert_same_routing(route(*arguments), routing_reference.route(*arguments))


@pytest.mark.parametrize("tokens", [5, CHUNK])
def test_all_pairs_may_have_one_expert_or_none(tokens: int) -> None:
    for expert in (2, 5, EXPERTS):
        ids = torch.full((tokens, 2), expert, device=DEVICE)
        places = torch.tensor([3, -1, 0, 2, -1, 1], dtype=torch.int32, device=DEVICE)
        assert_same_routing(route(ids, places, 4, 16), routing_reference.route(ids, places, 4, 16))


def test_ids_and_places_may_be_strided() -> None:
    ids, places = random_ids(9, 4, EXPERTS), random_places(2 * EXPERTS, 4)
    arguments = (ids[:, ::2], places[::2], 4, 16)
    assert_same_routing(route(*arguments), routing_reference.route(*arguments))


@pytest.mark.parametrize("tokens", [40, CHUNK])
def test_a_second_routing_keeps_the_places_of_the_first(tokens: int) -> None:
    ids = random_ids(tokens, 2, EXPERTS)
    first, second = (
        torch.tensor(p, dtype=torch.int32, device=DEVICE) for p in ([-1, 1, -1, -1, 0, -1], [-1, -1, 3, 2, -1, -1])
    )
    both = route(ids, second, 4, 16, before=route(ids, first, 4, 16))
    wanted = routing_reference.route(ids, second, 4, 16)
    every = routing_reference.route(ids, torch.maximum(first, second), 4, 16).resident
    assert_same_routing(both, replace(wanted, resident=every))


def test_the_places_of_other_layers_cost_nothing() -> None:
    """A pool has thousands; blocks are as many as this layer's experts may need, and the same ones."""
    ids = inputs(40)[1].to(DEVICE)
    places = torch.tensor([3000, -1, 7, 2999, -1, 0], dtype=torch.int32, device=DEVICE)
    few = torch.tensor([3, -1, 1, 2, -1, 0], dtype=torch.int32, device=DEVICE)
    wide, narrow = route(ids, places, 3072, 4), route(ids, few, 4, 4)
    assert len(wide.blocks) == max_blocks(ids.numel(), EXPERTS, 4) == len(narrow.blocks)
    assert torch.equal(wide.order, narrow.order)
    renamed = {3000: 3, 7: 1, 2999: 2, 0: 0, -1: -1}
    assert [[renamed[place], *rows] for place, *rows in wide.blocks.tolist()] == narrow.blocks.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_dtype_are_those_of_fp32(dtype: torch.dtype) -> None:
    experts, (x, ids, weights) = Layer().on_device(), inputs(3)
    assert_exact(run(experts, x, ids, weights.to(dtype)), run(experts, x, ids, weights.to(dtype).float()))


@pytest.mark.parametrize("weight_format", ["fp32", "int4_g32_zp", "int8"])
def test_experts_in_parts_have_the_same_bits(weight_format: str) -> None:
    layer, (x, ids, weights) = Layer(weight_format, bias=True), inputs(33)
    ids[0] = EXPERTS
    experts = layer.on_device()
    for parts in ([[0, 1, 2], [3, 4, 5]], [[5], [], [0, 2], [1, 3]]):
        products = Products(in_poison(x), ids.to(DEVICE), weights.to(DEVICE), experts)
        for part in parts:
            places = torch.tensor([e if e in part else -1 for e in range(EXPERTS)], dtype=torch.int32)
            products.add(places.to(DEVICE))
        known = [e for part in parts for e in part]
        every = torch.tensor([e if e in known else -1 for e in range(EXPERTS)], dtype=torch.int32)
        assert_exact(products.result().cpu(), run(experts, x, ids, weights, every))


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, "bf16"), (torch.float32, "fp16")])
def test_plain_weights_may_be_shorter_than_the_inputs(dtype: torch.dtype, stored: str) -> None:
    layer = Layer(stored)
    assert_reduction(run(layer.on_device(), *inputs(3, dtype)), layer.wanted(*inputs(3, dtype)))


def test_what_does_not_fit_is_refused() -> None:
    layer, (x, ids, weights) = Layer(), inputs(3)
    experts = layer.on_device()
    for arguments, message in (
        ((x[:, 1:], ids, weights), r"x is \[3, 135\] of torch.float32; it must be \[tokens, 136\]"),
        ((x.half(), ids, weights), "x is torch.float16, which does not hold the numbers of gate_up, torch.float32"),
        ((x.double(), ids, weights), "torch.float64"),
        ((x, ids.float(), weights), "topk_ids"),
        ((x, ids[1:], weights), "topk_ids"),
        ((x, ids, weights[:, 1:]), "topk_weights"),
        ((x, ids, weights, ALL_RESIDENT.long()), "resident"),
    ):
        with pytest.raises(ValueError, match=message):
            run(experts, *arguments)
    with pytest.raises(ValueError, match="contiguous"):
        moe(
            torch.zeros(HIDDEN, 3, device=DEVICE).T,
            *(t.to(DEVICE) for t in (ids, weights)),
            experts,
            ALL_RESIDENT.to(DEVICE),
        )
    gate_up, down = layer.weights
    for weights, bias, message in (
        ((gate_up[:, 1:], down), None, r"gate_up is \[6, 79, 136\]; .* it must be \[6, 80, 136\]"),
        ((gate_up[0], down), None, "experts, rows, columns"),
        ((gate_up.double(), down), None, "gate_up has dtype torch.float64"),
        ((FORMATS["int8_dyn"].quantize(gate_up), down), None, "int8_dyn, which has no GPU kernel; these have: fp32"),
        ((gate_up, down), torch.zeros(6, 5), "gate_up_bias"),
    ):
        with pytest.raises(ValueError, match=message):
            device_experts(*weights, SILU, bias, device=DEVICE)
    fp8, mxfp4 = FORMATS["fp8"].quantize(gate_up), FORMATS["mxfp4"].quantize(gate_up)
    fp8.codes[1, 2, 3], mxfp4.scales[1, 2, 3] = 0xFF, 3.0
    for weight, message in ((fp8, "NaN"), (mxfp4, "powers of two")):
        with pytest.raises(ValueError, match=message):
            device_experts(weight, down, SILU, device=DEVICE)
