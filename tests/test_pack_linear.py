"""The pass that packs linear layers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_exact, assert_reduction
from torch import nn

from ktcompile.graph import report
from ktcompile.graph.report import compile_reports
from ktcompile.ops.linear import PackedLinear
from ktcompile.ops.store import linear_store

OPTIONS = {"inner": "program"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    report.clear_compile_reports()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Three layers with one input, one of them with a bias, and one behind them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(24, 40, bias=False), nn.Linear(24, 8), nn.Linear(24, 8, bias=False)
        self.o = nn.Linear(40, 24)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * k.sum(-1, keepdim=True) + v.mean(-1, keepdim=True))


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding(ids, self.table), self.table)


def compiled(module: nn.Module, **options: str) -> Callable[..., torch.Tensor]:
    return torch.compile(module, backend="kt", fullgraph=True, options=OPTIONS | options)


def packed_layers(monkeypatch: pytest.MonkeyPatch) -> list[PackedLinear]:
    made: list[PackedLinear] = []
    store = linear_store()
    pack = store._do_pack

    def noted(weights: Sequence[torch.Tensor | None], spec: object) -> PackedLinear:
        made.append(pack(weights, spec))
        return made[-1]

    monkeypatch.setattr(store, "_do_pack", noted)
    return made


def matches() -> list[int]:
    return [p.matches for r in compile_reports() for p in r.passes if p.name == "pack_linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_with_one_input_are_one(dtype, monkeypatch):
    made = packed_layers(monkeypatch)
    module = Attention(dtype)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    got, wanted = compiled(module)(x), module(x)
    if dtype == torch.float32:
        assert_reduction(got, wanted)
    else:
        assert float((got - wanted).float().norm() / wanted.float().norm()) < 4 * torch.finfo(dtype).eps
    assert matches() == [4]
    assert sorted(layer.out_features for layer in made) == [24, 56]


def test_a_row_does_not_depend_on_the_others():
    module = Attention()
    x = torch.randn(70, 24, generator=torch.Generator().manual_seed(2))
    run = torch.compile(module, backend="kt", options=OPTIONS, dynamic=True)
    whole = run(x)
    for begin, end in ((0, 2), (3, 40), (40, 70)):
        assert_exact(run(x[begin:end]), whole[begin:end])


@pytest.mark.parametrize("cast", [lambda x: x.type(torch.float32), lambda x: x.float(), lambda x: x.to(torch.float32)])
def test_a_weight_that_is_used_in_fp32_is_packed_as_it_is_stored(cast, monkeypatch):
    module = Attention(torch.bfloat16).q
    seen = packed_layers(monkeypatch)

    def router(x: torch.Tensor) -> torch.Tensor:
        return F.linear(cast(x), cast(module.weight))

    with torch.no_grad():
        run = torch.compile(router, backend="kt", dynamic=True, options=OPTIONS)
        x = torch.randn(9, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
        out = run(x)
        assert len(seen) == 1 and out.dtype == torch.float32
        assert_reduction(out, x.double() @ module.weight.double().T, 24)
        assert_exact(run(x[2:5]), out[2:5], "fewer rows")


def test_weights_that_are_written_to_are_packed_again(monkeypatch):
    made = packed_layers(monkeypatch)
    module = Attention()
    run, x = compiled(module), torch.randn(3, 24)
    run(x)
    with torch.no_grad():
        module.q.weight.mul_(2)
    assert_reduction(run(x), module(x))
    module.o.weight.data = torch.randn(24, 40)
    assert_reduction(run(x), module(x))
    assert len(made) == 4


def test_taken_weights_are_unpacked_for_a_state_dict():
    module, twin = Attention(), Attention()
    run, x = compiled(module, weights="take"), torch.randn(3, 24)
    assert_reduction(run(x), twin(x))
    assert module.k.weight.isnan().all() and module.k.bias.isfinite().all()
    state = module.state_dict()
    for name, wanted in twin.state_dict().items():
        assert_exact(state[name], wanted)
    assert_reduction(run(x), twin(x))


def test_a_weight_that_is_used_otherwise_is_not_taken():
    module, ids = Tied(), torch.tensor([3, 7, 1])
    wanted = module(ids)
    run = compiled(module, weights="take")
    assert_reduction(run(ids), wanted)
    assert module.table.isfinite().all() and matches() == [1]


def test_the_packed_form_goes_with_the_weights():
    gc.collect()
    held = len(linear_store()._entries)
    module = Attention()
    compiled(module)(torch.randn(3, 24))
    assert len(linear_store()._entries) == held + 2
    torch._dynamo.reset()
    del module
    gc.collect()
    assert len(linear_store()._entries) == held


def test_what_is_no_constant_weight_is_left():
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 24), requires_grad=False)

        def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight * 2) + F.linear(x, given)

    module, x, given = Others(), torch.randn(3, 24), torch.randn(6, 24)
    assert_exact(compiled(module)(x, given), module(x, given))
    assert matches() == [0]


def test_gradients_keep_the_stock_layers():
    module = Attention().requires_grad_(True)
    compiled(module)(torch.randn(3, 24)).sum().backward()
    assert matches() == [0] and module.q.weight.grad is not None


def test_the_pass_can_be_left_out():
    module, x = Attention(), torch.randn(3, 24)
    run = torch.compile(module, backend="kt", options=OPTIONS | {"disable_passes": ["pack_linear"]})
    assert_exact(run(x), module(x))
    assert matches() == []


def test_large_layers_take_the_format_of_dense_layers_and_small_ones_keep_theirs(monkeypatch):
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(64, 512), nn.Linear(64, 512, bias=False)
            self.router, self.down = nn.Linear(64, 511, bias=False), nn.Linear(512, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x)) + self.router(x).sum(-1, keepdim=True)

    module = Block().requires_grad_(False)
    packed = packed_layers(monkeypatch)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    error = (compiled(module, dense_format="int8")(x) - module(x)).norm() / module(x).norm()
    assert {(p.out_features, p.format.name) for p in packed} == {(1024, "int8"), (511, "fp32"), (64, "fp32")}
    assert 0 < error < 0.02


class Model(nn.Module):
    """Layers that share an input, one behind a norm, and a head. fp32_head: its weight is cast, as some models do."""

    def __init__(self, fp32_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = nn.Linear(64, 512, bias=False), nn.Linear(64, 512, bias=False)
        self.down, self.norm = nn.Linear(512, 576, bias=False), nn.LayerNorm(576)
        self.head, self.fp32_head = nn.Linear(576, 640, bias=False), fp32_head
        self.bfloat16().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.down(F.silu(self.gate(x)) * self.up(x)))
        if self.fp32_head:
            return F.linear(x.float(), self.head.weight.float())
        return torch.tanh(self.head(x[-1:]) / 30).float() * 30


@pytest.mark.parametrize("fp32_head", [False, True])
@pytest.mark.parametrize(
    ("options", "linear", "head"),
    [
        ({"head_format": "int8"}, "bf16", "int8"),
        ({"dense_format": "int8"}, "int8", "int8"),
        ({"dense_format": "int8", "head_format": "int4"}, "int8", "int4_g32"),
        ({"dense_format": "int8", "head_format": "auto"}, "int8", "bf16"),
    ],
    ids=str,
)
def test_the_head_may_have_a_format_of_its_own(options, linear, head, fp32_head, monkeypatch):
    module, packed = Model(fp32_head), packed_layers(monkeypatch)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    got, wanted = compiled(module, **options)(x), module(x)
    assert {(p.out_features, p.format.name) for p in packed} == {(1024, linear), (576, linear), (640, head)}
    assert (got - wanted).norm() / wanted.norm() < 0.15


def test_layers_of_one_input_at_the_end_of_a_graph_are_no_head(monkeypatch):
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 512), nn.Linear(64, 512)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.q(x), self.k(x)

    packed = packed_layers(monkeypatch)
    compiled(Projections().requires_grad_(False), head_format="int8")(torch.randn(2, 64))
    assert [p.format.name for p in packed] == ["fp32"]
