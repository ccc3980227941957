"""The records of the weight formats: shapes, sizes, refusals, and the error of a layer that each may have."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_exact, relative_error
from torch import Tensor

from ktcompile.ops import Activation, ExpertsSpec, reference
from ktcompile.quant import ALIASES, FORMATS, WeightFormat, formats, resolve_format

QUANTIZED = tuple(name for name, f in FORMATS.items() if f.codec is not None)
every_format = pytest.mark.parametrize("name", QUANTIZED)
LAYOUTS = {"f32", "f16", "bf16", "int8", "int8_dyn", "int4", "int4_dyn", "fp8", "mxfp4"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_records():
    assert {f.layout for f in FORMATS.values()} == LAYOUTS
    for name, f in FORMATS.items():
        assert f.name == name
        assert (f.storage is None) == (f.codec is not None) == (f.group_size is not None)
    assert set(ALIASES.values()) <= set(FORMATS) and not set(ALIASES) & set(FORMATS)


@every_format
def test_bytes_per_weight_are_what_is_stored(name):
    f = FORMATS[name]
    rows, columns = 64, 4096
    made = f.quantize(normal(rows, columns))
    bits = 4 if f.layout in ("int4", "int4_dyn", "mxfp4") else 8
    scale_bytes = {"int4": 2, "int4_dyn": 2, "mxfp4": 1}.get(f.layout, 4)
    stored = rows * columns * bits / 8 + made.scales.numel() * scale_bytes
    stored += 0 if made.zeros is None else made.zeros.numel()
    assert stored / (rows * columns) == pytest.approx(f.bytes_per_weight, rel=1e-3)


@every_format
@pytest.mark.parametrize("shape", ((1, 1), (4, 33), (3, 5, 130), (2, 2, 3, 64)))
def test_shapes(name, shape):
    f = FORMATS[name]
    made = f.quantize(normal(*shape))
    groups = -(-shape[-1] // f.group_size) if f.group_size else 1
    assert made.format is f
    assert made.codes.shape == made.shape == shape and made.codes.element_size() == 1
    assert made.scales.shape == (*shape[:-1], groups) and made.scales.dtype == torch.float32
    if made.zeros is not None:
        assert made.zeros.shape == made.scales.shape and made.zeros.dtype == torch.uint8
    values = made.dequantize()
    assert values.shape == shape and values.dtype == torch.float32
    assert_exact(f.round_trip(normal(*shape)), values)
    for e in range(shape[0] if len(shape) == 3 else 0):
        assert_exact(f.round_trip(normal(*shape)[e]), values[e], "a matrix alone")


@every_format
def test_the_size_of_slices_does_not_matter(name, monkeypatch):
    w = normal(3, 300, 200)
    wanted = FORMATS[name].quantize(w)
    monkeypatch.setattr(formats, "_SLICE", 1000)
    got = FORMATS[name].quantize(w)
    assert torch.equal(got.codes, wanted.codes)
    assert_exact(got.scales, wanted.scales, name)
    assert_exact(got.dequantize(), wanted.dequantize(), name)


@every_format
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_sources_are_read_as_they_are(name, dtype):
    w = (normal(2, 40, 96) * 0.1).to(dtype)
    assert_exact(FORMATS[name].round_trip(w), FORMATS[name].round_trip(w.float()))


@every_format
def test_sources_of_any_strides(name):
    w = normal(2, 96, 40)
    assert_exact(FORMATS[name].round_trip(w.mT), FORMATS[name].round_trip(w.mT.contiguous()))
    assert_exact(FORMATS[name].round_trip(w[:, ::2]), FORMATS[name].round_trip(w[:, ::2].contiguous()))


@every_format
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf"), -(2.0**121)))
def test_values_that_cannot_be_stored_are_named(name, bad):
    w = normal(2, 300, 600)
    w[1, 256, 77] = bad
    words = f"down_proj has {bad} at matrix 1, row 256, column 77; it must be finite"
    with pytest.raises(ValueError, match=re.escape(words)):
        FORMATS[name].quantize(w, "down_proj")
    with pytest.raises(ValueError, match="the weight has"):
        FORMATS[name].round_trip(w)


@every_format
def test_empty_weights(name):
    for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        made = FORMATS[name].quantize(torch.empty(shape))
        assert made.codes.shape == shape and made.dequantize().shape == shape


def test_what_is_no_weight():
    with pytest.raises(ValueError, match=r"up_proj is \[3\] of torch.float32; it must be \[..., N, K\]"):
        FORMATS["int8"].quantize(torch.ones(3), "up_proj")
    with pytest.raises(ValueError, match=r"the weight is \[3, 3\] of torch.float64"):
        FORMATS["int8"].quantize(torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="bf16 stores the weight itself"):
        FORMATS["bf16"].quantize(torch.ones(3, 3))


def test_names():
    for name in FORMATS:
        assert resolve_format(name, torch.float32) is FORMATS[name]
    assert resolve_format("auto", torch.float16).name == "fp16"
    with pytest.raises(ValueError, match="weight_format is 'int3'; it must be one of auto, int4, int4_dyn, fp32"):
        resolve_format("int3", torch.float32)
    with pytest.raises(ValueError, match=r"the weight has dtype torch.float64; it must be one of torch.float32"):
        resolve_format("auto", torch.float64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_is_within_the_budget_of_its_format(name, seed):
    """T tokens, K top_k, H hidden_size, I intermediate_size, E experts."""
    f, (T, K, H, I, E) = FORMATS[name], (64, 2, 256, 128, 4)  # noqa: E741
    x_TH, scores_TE = normal(T, H, seed=seed), normal(T, E, seed=seed + 100)
    weights_TK, ids_TK = scores_TE.softmax(1).topk(K)
    gate_up = normal(E, 2 * I, H, seed=seed + 200) * H**-0.5
    down = normal(E, H, I, seed=seed + 300) * I**-0.5
    wanted = reference.moe(x_TH, ids_TK, weights_TK, gate_up, down, ExpertsSpec(Activation("silu")))
    got = torch.zeros(T, H)
    stored_gate_up, stored_down = f.round_trip(gate_up), f.round_trip(down)
    for e in range(E):
        token, slot = torch.where(ids_TK == e)
        gate, up = linear(x_TH[token], stored_gate_up[e], f).chunk(2, -1)
        result = linear(F.silu(gate) * up, stored_down[e], f)
        got.index_add_(0, token, result * weights_TK[token, slot, None])
    error = relative_error(got, wanted)
    assert error < f.error_budget
    # A budget that is far from what happens tells nothing.
    assert error > f.error_budget * 0.3


def linear(x: Tensor, w: Tensor, weight_format: WeightFormat) -> Tensor:
    return F.linear(reference.rows_of(weight_format)(x).float(), w)
