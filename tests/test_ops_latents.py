"""Attention over latents: its products in plain torch, packed, in graphs; against what expanded latents give."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.attention import poisoned
from helpers.compare import assert_exact, assert_reduction
from torch import Tensor, nn

from ktcompile.graph.report import clear_compile_reports, compile_reports
from ktcompile.machine import machine
from ktcompile.ops import linear, pack_linear
from ktcompile.ops.latents import PackedLatents
from ktcompile.ops.spec import LatentsSpec
from ktcompile.ops.store import latents_store
from ktcompile.quant import FORMATS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (heads, key size, value size, latent size): of DeepSeek-V2-Lite's shape but for the heads, odd, one head, one element.
SHAPES = ((3, 128, 128, 512), (5, 10, 14, 20), (1, 33, 7, 65), (4, 1, 1, 1))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    clear_compile_reports()
    yield
    torch._dynamo.reset()


def weight_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    heads, key, value, latent = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(heads * (key + value), latent, generator=generator) * latent**-0.5).to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_latents_is_that_over_what_they_expand_to(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """The scores and the results, in fp64 from the expanded latents; with the operators, and with packed weights."""
    heads, key_size, value_size, size = shape
    weight, latents = weight_of(shape, dtype), random(9, size, dtype=dtype)
    query, weights = random(2, 4, heads, key_size, dtype=dtype), random(2, 4, heads, 9).softmax(-1)
    expanded = (latents.double() @ weight.double().T).view(9, heads, -1)
    keys, values = expanded[..., :key_size], expanded[..., key_size:]
    scores = torch.einsum("abhk,phk->abhp", query.double(), keys)
    result = torch.einsum("abhp,phv->abhv", weights.double(), values)
    mean = torch.einsum("abhp,pl->abhl", weights.double(), latents.double()).to(dtype)
    packed = PackedLatents(weight, LatentsSpec(heads, key_size))
    for into, out in (
        (torch.ops.kt.into_latents(query, weight), torch.ops.kt.out_of_latents(mean, weight, value_size)),
        (
            torch.ops.kt.head_linear(query, packed.keys.handle, size),
            torch.ops.kt.head_linear(mean, packed.values.handle, value_size),
        ),
    ):
        assert into.dtype == out.dtype == dtype
        if size > 1:  # else the products are tiny beside their roundings
            assert (into.double() @ latents.double().T - scores).norm() <= scores.norm() * 4 * torch.finfo(
                dtype
            ).eps ** 0.9
        assert (out.double() - result).norm() <= result.norm() * 8 * torch.finfo(dtype).eps ** 0.9


@pytest.mark.parametrize("isa", machine().isas)
@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if not f.dynamic])
def test_each_head_is_a_layer_by_itself(name: str, isa: str, threads: Callable[[int], None]) -> None:
    """To the bit, however many rows there are, whatever lies between them, on any number of threads."""
    heads, size, features = 3, 70, 45
    weight = random(heads, features, size) * size**-0.5
    packed = pack_linear(weight, None, name, isa)
    alone = [pack_linear(w, None, name, isa) for w in weight]
    assert_exact(packed.unpack(), torch.cat([p.unpack() for p in alone]))
    x = random(300, heads, size, dtype=torch.bfloat16)
    wanted = torch.stack([linear(x[:, h], p) for h, p in enumerate(alone)], 1)
    for count, rows in ((1, 300), (2, 300), (5, 7), (2, 1)):
        threads(count)
        head_beside_head, strided = poisoned(x[:rows]), x[:rows].transpose(0, 1).contiguous().transpose(0, 1)
        for given in (x[:rows], head_beside_head, strided, x[:rows, None]):
            got = torch.ops.kt.head_linear(given, packed.handle, features)
            assert_exact(got.reshape(rows, heads, features), wanted[:rows], f"{rows} rows on {count} threads")


def test_what_is_of_another_shape_is_refused() -> None:
    packed = pack_linear(random(3, 45, 70))
    for shape in ((2, 3, 69), (2, 4, 70), (70,)):
        with pytest.raises(ValueError, match=r"must be \[3, 70\]"):
            torch.ops.kt.head_linear(random(*shape), packed.handle, 45)
    with pytest.raises(ValueError, match="weight is"):
        pack_linear(random(3, 45, 70), random(45))
    with pytest.raises(ValueError, match="was it freed"):
        torch.ops.kt.head_linear(random(2, 3, 70), torch.tensor([0]), 45)


class Absorbed(nn.Module):
    """What a layer computes before and after its attention over latents, with operations of programs around it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(60, 4 * (20 + 24), bias=False, dtype=dtype)
        self.after = nn.Linear(4 * 24, 16, bias=False, dtype=dtype)
        with torch.no_grad():
            for layer in (self.kv_b_proj, self.after):
                layer.weight.copy_(random(*layer.weight.shape) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        query = x.view(1, -1, 4, 28)[..., :20]
        latents = torch.ops.kt.into_latents.default(query, self.kv_b_proj.weight)
        out = torch.ops.kt.out_of_latents.default(latents, self.kv_b_proj.weight, 24)
        return self.after(out.reshape(*out.shape[:2], -1))


def compiled(module: nn.Module, **options: object) -> Callable[[Tensor], Tensor]:
    run = torch.compile(module, backend="kt", dynamic=True, fullgraph=True, options=options)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return run(x)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_has_both_products_packed_and_gives_the_bits_of_the_operators(dtype: torch.dtype) -> None:
    module = Absorbed(dtype)
    run = compiled(module)
    packed = PackedLatents(module.kv_b_proj.weight.detach(), LatentsSpec(4, 20))
    after = pack_linear(module.after.weight.detach())
    for tokens in (5, 1, 40):
        x = random(1, tokens, 4 * 28, dtype=dtype)
        latents = torch.ops.kt.head_linear(x.view(1, tokens, 4, 28)[..., :20], packed.keys.handle, 60)
        values = torch.ops.kt.head_linear(latents, packed.values.handle, 24)
        assert_exact(run(x), linear(values.reshape(1, tokens, -1), after), f"{tokens} tokens")
    report = compile_reports()[-1]
    assert {p.name: p.matches for p in report.passes}["pack_latents"] == 2


def test_a_weight_is_packed_once_for_both_and_taken_once() -> None:
    module, twin = Absorbed(torch.float32), Absorbed(torch.float32)
    held = set(latents_store()._entries)
    run, x = compiled(module, weights="take"), random(1, 6, 4 * 28)
    with torch.no_grad():
        wanted = twin(x)
    assert_reduction(run(x), wanted)
    assert len(set(latents_store()._entries) - held) == 1
    assert module.kv_b_proj.weight.isnan().all()
    assert_exact(module.state_dict()["kv_b_proj.weight"], twin.kv_b_proj.weight.detach())
    with torch.no_grad():
        module.kv_b_proj.weight.copy_(2 * twin.kv_b_proj.weight)
    assert_reduction(run(x), 4 * wanted)


def test_dense_layers_have_their_format_here_too() -> None:
    module = Absorbed(torch.float32)
    run, x = compiled(module, dense_format="int8"), random(1, 6, 4 * 28)
    run(x)
    key = [k for k in latents_store()._entries if isinstance(k[-1], LatentsSpec) and k[-1].weight_format == "int8"]
    assert len(key) == 1


def test_a_gradient_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="have no backward"):
        Absorbed(torch.float32)(random(1, 6, 4 * 28)).sum().backward()
