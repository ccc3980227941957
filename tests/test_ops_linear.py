"""`kt::linear`: every format on every instruction set against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction, relative_error

from ktcompile import _native
from ktcompile.machine import machine
from ktcompile.ops import linear, pack_linear, reference
from ktcompile.quant import FORMATS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (N, K): odd, narrow, beyond a panel, K that no group divides.
# AMX has no kernels of their own for these, which round as all others do.
ORDER_OF_ALL = ("fp32", "fp16", *(name for name, f in FORMATS.items() if f.dynamic))
SHAPES = ((1, 1), (33, 70), (64, 160), (129, 320), (40, 1000))


def random_case(
    shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (x [R, K], weight [N, K], bias [N])."""
    generator = torch.Generator().manual_seed(sum(shape) + rows)
    features, inputs = shape
    weight = torch.randn(features, inputs, generator=generator) * inputs**-0.5
    bias = torch.randn(features, generator=generator)
    return torch.randn(rows, inputs, generator=generator).to(dtype), weight.to(dtype), bias.to(dtype)


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, name: str) -> torch.Tensor:
    stored = FORMATS[name].round_trip(weight).double()
    return reference.rows_of(FORMATS[name])(x) @ stored.T + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_isa_agrees_with_plain_torch(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = random_case(shape, 37, dtype)
    wanted = expected(x, weight, bias, name)
    first: torch.Tensor | None = None
    for isa in machine().isas:
        packed = pack_linear(weight, bias, name, isa)
        got = linear(x, packed)
        assert got.dtype == dtype
        if name != "fp32" or dtype == torch.float32:
            assert_reduction(got, wanted, f"{name} {isa}")
        if _native.sums_on_tiles(isa) and dtype == torch.bfloat16 and name not in ORDER_OF_ALL:
            continue  # AMX rounds in another order
        first = got if first is None else first
        assert_exact(got, first, f"{name} {isa}")


@pytest.mark.parametrize("isa", machine().isas)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_in_any_batch_on_any_number_of_threads(
    name: str, isa: str, threads: Callable[[int], None]
) -> None:
    rows = 24 if isa == "amx_emu" else 300
    x, weight, bias = random_case((70, 224), rows, torch.bfloat16)
    packed = pack_linear(weight, bias, name, isa)
    whole = linear(x, packed)
    for count in (1, 2, 5):
        threads(count)
        assert_exact(linear(x, packed), whole, f"{count} threads")
        for begin, end in ((0, 1), (3, 5), (7, 14), (rows - 1, rows), (2, rows - 1)):
            assert_exact(linear(x[begin:end], packed), whole[begin:end], f"{begin}:{end}, {count} threads")


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.codec is not None])
def test_quantised_weights_are_packed_as_they_are(name: str) -> None:
    x, weight, _ = random_case((64, 192), 5, torch.float32)
    quantized = FORMATS[name].quantize(weight)
    packed = pack_linear(quantized)
    assert packed.format.name == name
    assert_exact(packed.unpack(), quantized.dequantize(), name)
    assert_exact(linear(x, packed), linear(x, pack_linear(weight, weight_format=name)), name)


def test_shapes_and_strides() -> None:
    x, weight, bias = random_case((40, 64), 12, torch.float32)
    packed = pack_linear(weight.T.contiguous().T, bias)
    wanted = linear(x, packed)
    assert_exact(linear(x.view(3, 4, 64), packed), wanted.view(3, 4, 40))
    assert_exact(linear(x[0], packed), wanted[0])
    assert_exact(linear(x.T.contiguous().T, packed), wanted)
    assert linear(x[:0], packed).shape == (0, 40)
    assert relative_error(packed.unpack(), weight) == 0


def test_compiles_as_one_graph() -> None:
    x, weight, bias = random_case((40, 64), 3, torch.float32)
    packed = pack_linear(weight, bias)
    compiled = torch.compile(lambda t: linear(t, packed) * 2, fullgraph=True, backend="eager", dynamic=True)
    assert_exact(compiled(x), linear(x, packed) * 2)
    assert_exact(compiled(x[:2]), linear(x[:2], packed) * 2)


def test_a_gradient_is_refused() -> None:
    x, weight, _ = random_case((40, 64), 3, torch.float32)
    result = linear(x.requires_grad_(), pack_linear(weight))
    with pytest.raises(NotImplementedError, match="no backward"):
        result.sum().backward()


def test_bad_input_is_named() -> None:
    weight = torch.ones(4, 8)
    for bad, message in (
        (lambda: pack_linear(torch.ones(8)), r"weight is \[8\]"),
        (lambda: pack_linear(torch.ones(0, 8)), r"weight is \[0, 8\]"),
        (lambda: pack_linear(weight, torch.ones(5)), r"bias is \[5\]; it must be \[4\]"),
        (lambda: pack_linear(weight.double()), "torch.float64"),
        (lambda: pack_linear(weight, weight_format="int3"), "'int3'"),
        (lambda: pack_linear(weight, isa="neon"), "'neon'"),
        (lambda: pack_linear(FORMATS["int8"].quantize(weight), weight_format="fp8"), "quantised as int8"),
        (lambda: pack_linear(weight * float("nan"), weight_format="int8"), "weight has nan"),
        (lambda: linear(torch.ones(2, 7), pack_linear(weight)), r"x is \[2, 7\]; its last dimension must be 8"),
        (lambda: linear(torch.ones(2, 8).double(), pack_linear(weight)), "torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_an_alias_names_the_format_of_quantised_weights() -> None:
    quantized = FORMATS["int4_g32"].quantize(torch.ones(4, 32))
    assert pack_linear(quantized, weight_format="int4").format.name == "int4_g32"
