"""What each family of formats makes of weights: properties of its values, and other definitions of the same format."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.compare import assert_exact, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ktcompile.quant import FORMATS, QuantizedWeight

QUANTIZED = tuple(name for name, f in FORMATS.items() if f.codec is not None)
INT4 = tuple(name for name, f in FORMATS.items() if f.layout == "int4")
KINDS = ("normal", "uniform", "positive", "heavy", "constant", "sparse", "alternating", "zeros")
SHAPES = ((1, 1), (3, 1), (5, 33), (2, 130), (130, 64), (3, 2, 32), (2, 7, 257))


def weights(kind: str, shape: tuple[int, ...], seed: int, exponent: int = 0) -> Tensor:
    """Return weights of one kind of distribution, times 2**exponent."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    made = {
        "normal": normal,
        "uniform": torch.rand(shape, generator=generator) * 2 - 1,
        "positive": normal.abs() + 0.1,
        "heavy": normal.pow(3) * normal.abs().exp(),
        "constant": normal.flatten()[0].expand(shape),
        "sparse": normal * (torch.rand(shape, generator=generator) < 0.05),
        "alternating": torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0),
        "zeros": torch.zeros(shape),
    }[kind]
    return torch.ldexp(made, torch.tensor(exponent))


any_weights = st.builds(
    weights, st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(0, 10**6), st.sampled_from((-80, -20, 0, 90))
)
every_format = pytest.mark.parametrize("name", QUANTIZED)


@every_format
@given(w=any_weights)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_values_that_came_from_codes_give_the_same_values(name, w):
    once = FORMATS[name].round_trip(w)
    assert once.isfinite().all()
    assert_exact(FORMATS[name].round_trip(once) + 0.0, once + 0.0, name)  # -0 counts as 0


@every_format
@given(w=any_weights)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_zeros_stay_zeros_and_codes_are_in_range(name, w):
    made = FORMATS[name].quantize(w)
    assert (made.dequantize()[w == 0] == 0).all()
    codes = made.codes.int()
    if name.startswith("int8"):
        assert codes.abs().max() <= 127
    if name.startswith(("int4", "mxfp4")):
        assert codes.max() <= 15
    if name.startswith("fp8"):
        assert ((codes & 127) != 127).all()
    if made.zeros is not None:
        assert made.zeros.max() <= 15


@every_format
@pytest.mark.parametrize("kind", ("normal", "heavy", "positive"))
def test_a_power_of_two_scales_the_values(name, kind):
    w = weights(kind, (6, 160), 1)
    wanted = FORMATS[name].round_trip(w)
    for exponent in (-70, -3, 5, 80):
        factor = torch.tensor(2.0**exponent)
        assert_exact(FORMATS[name].round_trip(w * factor), wanted * factor, f"{name} 2**{exponent}")


@every_format
def test_rows_are_apart(name):
    rows = FORMATS[name].codec.block_rows
    w = weights("normal", (2 * rows, 200), 2)
    together = FORMATS[name].round_trip(w)
    assert_exact(FORMATS[name].round_trip(w[rows:]), together[rows:], name)


@every_format
def test_groups_below_the_smallest_magnitude_are_zeros(name):
    w = weights("normal", (128, 128), 3)
    w[:, :] *= 2.0**-110
    assert (FORMATS[name].round_trip(w) == 0).all()


@given(w=any_weights)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_int8_is_off_by_half_a_step_at_most(w):
    made = FORMATS["int8"].quantize(w)
    error = (made.dequantize() - w).abs()
    assert (error <= made.scales * 0.502).all()
    assert (made.scales >= w.abs().amax(-1, keepdim=True) / 127 * (1 - 2**-16)).all()


@pytest.mark.parametrize("name", ("fp8", "fp8_channel"))
@given(w=any_weights)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fp8_is_off_by_half_a_unit_at_most(name, w):
    made = FORMATS[name].quantize(w)
    group = FORMATS[name].group_size or w.shape[-1]
    scales = made.scales.repeat_interleave(group, -1)[..., : w.shape[-1]]
    error = (made.dequantize() - w).abs()
    assert (error <= torch.maximum(w.abs() * 2**-4, scales * 2**-10) * (1 + 2**-14)).all()


def test_fp8_blocks_share_a_scale():
    made = FORMATS["fp8"].quantize(weights("normal", (300, 200), 4))
    for begin, end in ((0, 128), (128, 256), (256, 300)):
        assert (made.scales[begin:end] == made.scales[begin]).all()
    assert len(made.scales.unique()) == 6


def test_fp8_codes_are_e4m3():
    def value(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
        if exponent == 15 and mantissa == 7:
            return math.nan
        return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))

    table = torch.tensor([value(code) for code in range(256)])
    codec = FORMATS["fp8_channel"].codec
    codes = torch.arange(256, dtype=torch.uint8)
    assert_exact(codec.decode(codes.view(1, 256), None)[0], table)
    assert_exact(codes.view(torch.float8_e4m3fn).float(), table)

    # With 448 in a row its scale is 1, and every code is the nearest value.
    w = torch.cat((torch.tensor([448.0]), weights("normal", (2000,), 5) * 20)).clamp(-448, 448).view(1, -1)
    made = FORMATS["fp8_channel"].quantize(w)
    finite = table[table.isfinite()]
    assert made.scales.item() == 1
    nearest = (w.view(-1, 1) - finite).abs().amin(1)
    assert_exact((made.dequantize() - w).abs()[0], nearest)
    assert torch.equal(made.codes, w.to(torch.float8_e4m3fn).view(torch.uint8))


def round_to_nearest(w: Tensor, name: str) -> Tensor:
    """Return four-bit values with scales from the extremes of each group, without a search."""
    group = FORMATS[name].group_size
    padded = torch.nn.functional.pad(w, (0, -w.shape[-1] % group))
    w_g = padded.unflatten(-1, (-1, group))
    if name.endswith("_zp"):
        high, low = w_g.amax(-1, keepdim=True).clamp_min(0), w_g.amin(-1, keepdim=True).clamp_max(0)
        scale = ((high - low) / 15).bfloat16().float()
        zero = torch.where(scale == 0, 0, torch.round(-low / scale)).clamp(0, 15)
        values = ((w_g / scale).nan_to_num().round() + zero).clamp(0, 15).sub(zero) * scale
    else:
        scale = (w_g.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
        values = (w_g / scale).nan_to_num().round().clamp(-8, 7) * scale
    return values.flatten(-2)[..., : w.shape[-1]]


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("int4_g32", 0.84),
        ("int4_g64", 0.84),
        ("int4_g128", 0.84),
        ("int4_g32_zp", 0.96),
        ("int4_g64_zp", 0.96),
        ("int4_g128_zp", 0.96),
    ],
)
def test_int4_is_better_than_rounding_to_nearest(name, gain):
    assert set(INT4) >= {name}
    w = weights("normal", (256, 512), 6)
    assert relative_error(FORMATS[name].round_trip(w), w) < gain * relative_error(round_to_nearest(w, name), w)


@pytest.mark.parametrize("name", INT4)
@given(w=any_weights)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_int4_is_never_worse_than_rounding_to_nearest(name, w):
    group = FORMATS[name].group_size
    # Squares of normalised weights do not vanish.
    unit = w.double() / w.abs().max().clamp_min(2.0**-99)

    def errors(values: Tensor) -> Tensor:
        squares = (values.double() / w.abs().max().clamp_min(2.0**-99) - unit).square()
        return torch.nn.functional.pad(squares, (0, -w.shape[-1] % group)).unflatten(-1, (-1, group)).sum(-1)

    ours, nearest = errors(FORMATS[name].round_trip(w)), errors(round_to_nearest(w, name))
    if name.endswith("_zp"):
        # The other takes its zero point from the rounded scale, which can be luck for a single group.
        ours, nearest = ours.sum(), nearest.sum() * 1.01
    assert (ours <= nearest * (1 + 1e-5) + 1e-12).all()


def test_int4_scales_are_values_of_bf16():
    for name in INT4:
        scales = FORMATS[name].quantize(weights("heavy", (40, 256), 7)).scales
        assert_exact(scales.bfloat16().float(), scales, name)
    assert (scales >= 0).all(), "with a zero point they are positive"


def test_int4_puts_the_extreme_on_the_code_without_a_counterpart():
    w = torch.tensor([[8.0, 1, -2, 3, -7, 5, 6, -4] * 4, [-8.0, 1, -2, 3, 7, 5, 6, -4] * 4])
    made = FORMATS["int4_g32"].quantize(w)
    assert made.scales.flatten().tolist() == [-1, 1]
    assert made.codes[:, 0].tolist() == [0, 0]
    assert_exact(made.dequantize(), w)


def test_mxfp4_rounds_as_e2m1_does():
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    # 6 fixes the scale at 1. Ties go to the code that is even.
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 0.26: 0.5, 2.4: 2, 5.1: 6, 4.9: 4}
    w = torch.zeros(2, 32)
    w[:, 0] = 6
    w[0, 1:9] = torch.tensor(magnitudes)
    w[0, 9:20] = torch.tensor(list(ties))
    w[1, 1:] = -w[0, 1:]
    made = FORMATS["mxfp4"].quantize(w)
    assert (made.scales == 1).all()
    assert made.dequantize()[0].tolist()[1:20] == [*magnitudes, *ties.values()]
    assert made.codes[0, 1:9].tolist() == list(range(8))
    assert made.codes[1, 2:9].tolist() == list(range(9, 16))


@given(w=any_weights)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_mxfp4_is_never_worse_than_the_exponent_of_the_specification(w):
    made = FORMATS["mxfp4"].quantize(w)
    assert (torch.frexp(made.scales).mantissa == 0.5).all()
    columns = w.shape[-1]
    groups = torch.nn.functional.pad(w, (0, -columns % 32)).unflatten(-1, (-1, 32)).double()
    values = torch.nn.functional.pad(made.dequantize(), (0, -columns % 32)).unflatten(-1, (-1, 32)).double()
    largest = groups.abs().amax(-1, keepdim=True)
    unit = torch.exp2(torch.floor(torch.log2(largest.clamp_min(2.0**-99))) - 2)
    table = torch.tensor((0, 0.5, 1, 1.5, 2, 3, 4, 6), dtype=torch.float64)
    nearest = (groups.abs().unsqueeze(-1) / unit.unsqueeze(-1) - table).abs().amin(-1)
    ours = ((values - groups) / unit).square().sum(-1)
    assert (ours <= nearest.square().sum(-1) + 1e-6).all()


def test_mxfp4_is_what_transformers_reads():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    made = FORMATS["mxfp4"].quantize(weights("normal", (3, 8, 96), 8))
    blocks = (made.codes[..., 0::2] | made.codes[..., 1::2] << 4).unflatten(-1, (-1, 16))
    exponents = (torch.frexp(made.scales).exponent - 1 + 127).to(torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    assert_exact(made.dequantize(), theirs.transpose(1, 2).contiguous())


@every_format
def test_errors_on_normal_weights(name):
    most = {
        "int8": 0.0084,
        "int8_dyn": 0.0084,
        "int4_g32": 0.082,
        "int4_g64": 0.091,
        "int4_g128": 0.098,
        "int4_g32_dyn": 0.082,
        "int4_g64_dyn": 0.091,
        "int4_g128_dyn": 0.098,
        "int4_g32_zp": 0.078,
        "int4_g64_zp": 0.088,
        "int4_g128_zp": 0.096,
        "fp8": 0.027,
        "fp8_channel": 0.027,
        "mxfp4": 0.113,
    }
    w = weights("normal", (256, 2048), 9)
    made: QuantizedWeight = FORMATS[name].quantize(w)
    assert relative_error(made.dequantize(), w) < most[name]
