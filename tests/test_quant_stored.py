"""Weights as other tools store them: the values are what each layout means, to the bit.

Each layout is packed here by its public definition. Fixed words and values are those of the tools: compressed-tensors
0.20, AutoAWQ 0.2.9 and AutoGPTQ 0.7.1; larger random weights of each had equal values too.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers.compare import assert_exact
from torch import Tensor

from ktcompile.quant.stored import read_awq, read_fp8, read_gptq, read_mxfp4, read_packed_int4

E4M3 = torch.float8_e4m3fn


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def words(nibbles: Tensor) -> Tensor:
    """Return nibbles [..., 8 W], zeros after the last, as int32 [..., W], the first in the lowest bits."""
    padded = torch.nn.functional.pad(nibbles.long(), (0, -nibbles.shape[-1] % 8))
    packed = sum(padded[..., i::8] << 4 * i for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def for_columns(per_group: Tensor, group: int, columns: int) -> Tensor:
    return torch.stack([per_group[..., k // group] for k in range(columns)], -1)


def assert_int4(made, codes: Tensor, zeros: Tensor | int, scales: Tensor, group: int, name: str) -> None:
    """Fail unless values are `(code - zero) * scale`, all of them [N, ...]."""
    columns = codes.shape[-1]
    steps = codes - (zeros if isinstance(zeros, int) else for_columns(zeros, group, columns))
    assert made.format.name == name
    assert torch.equal(made.codes.long(), codes)
    assert_exact(made.dequantize(), (steps.double() * for_columns(scales, group, columns).double()).float(), name)


GROUPS = (
    (32, 96, "int4_g32"),
    (64, 128, "int4_g64"),
    (128, 256, "int4_g128"),
    (128, 192, "int4_g128"),
    (96, 192, "int4_g32"),
    (256, 512, "int4_g128"),
)


class TestFp8:
    @pytest.mark.parametrize("shape", ((128, 128), (300, 200), (1, 1), (2, 130, 257)))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("block", ((128, 128), (64, 128), (1, 256)))
    def test_blocks(self, shape, dtype, block):
        rows, columns = shape[-2:]
        weight = (integers(-300, 300, *shape) / 7).to(E4M3)
        scale = uniform(*shape[:-2], math.ceil(rows / block[0]), math.ceil(columns / block[1])).to(dtype)
        made = read_fp8(weight, scale, block, "w")
        wanted = weight.float()
        for n in range(0, rows, block[0]):
            for k in range(0, columns, block[1]):
                one = scale[..., n // block[0], k // block[1]].float()[..., None, None]
                wanted[..., n : n + block[0], k : k + block[1]] *= one
        assert made.format.name == "fp8"
        assert torch.equal(made.codes, weight.view(torch.uint8))
        assert_exact(made.dequantize(), wanted)

    @pytest.mark.parametrize("intermediate", (64, 100, 128, 192))
    def test_parts_have_blocks_of_their_own(self, intermediate):
        gate, up = ((integers(-300, 300, 2, intermediate, 256, seed=s) / 7).to(E4M3) for s in (1, 2))
        blocks = math.ceil(intermediate / 128)
        gate_scale, up_scale = uniform(2, blocks, 2, seed=3), uniform(2, blocks, 2, seed=4)
        made = read_fp8(
            torch.cat((gate.view(torch.uint8), up.view(torch.uint8)), 1).view(E4M3),
            torch.cat((gate_scale, up_scale), 1),
            (128, 128),
            "w",
            parts=2,
        )
        apart = [read_fp8(w, s, (128, 128), "w").dequantize() for w, s in ((gate, gate_scale), (up, up_scale))]
        assert_exact(made.dequantize(), torch.cat(apart, 1))

    def test_blocks_across_parts(self):
        weight, scale = (integers(-300, 300, 384, 128) / 7).to(E4M3), uniform(3, 1)
        across = read_fp8(weight, scale, (128, 128), "w", parts=2)
        assert_exact(across.dequantize(), read_fp8(weight, scale, (128, 128), "w").dequantize())

    @pytest.mark.parametrize("shape", ((40, 200), (3, 40, 200)))
    def test_rows_matrices_and_all(self, shape):
        weight = (integers(-300, 300, *shape) / 7).to(E4M3)
        experts = shape[:-2]
        for scale in (
            uniform(*shape[:-1], 1),
            uniform(*experts, 1, 1),
            uniform(*experts),
            uniform(1),
            torch.tensor(0.3),
        ):
            made = read_fp8(weight, scale, None, "w")
            wide = scale[:, None, None] if scale.shape == experts and experts else scale
            assert made.format.name == "fp8_channel"
            assert_exact(made.dequantize(), weight.float() * wide)
        halves = uniform(*experts, 2, 1)
        made = read_fp8(weight, halves, None, "w", parts=2)
        assert_exact(made.dequantize(), weight.float() * halves.repeat_interleave(20, -2))

    def test_scales_that_are_exponents(self):
        weight, exponents = (integers(-300, 300, 128, 256) / 7).to(E4M3), torch.tensor([[120, 130]]).byte()
        wanted = read_fp8(weight, torch.tensor([[2.0**-7, 8.0]]), (128, 128), "w").dequantize()
        for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
            assert_exact(read_fp8(weight, scale, (128, 128), "w").dequantize(), wanted)

    def test_refusals(self):
        weight, scale = torch.ones(128, 128).to(E4M3), torch.ones(1, 1)
        with pytest.raises(ValueError, match=r"up has dtype torch.float8_e5m2; .* only torch.float8_e4m3fn"):
            read_fp8(weight.to(torch.float8_e5m2), scale, (128, 128), "up")
        with pytest.raises(ValueError, match="up has NaN codes"):
            read_fp8(torch.full((2, 2), torch.nan).to(E4M3), scale, (128, 128), "up")
        with pytest.raises(ValueError, match="up has scales that are NaN or infinite"):
            read_fp8(weight, scale * torch.inf, (128, 128), "up")
        with pytest.raises(ValueError, match="up has scales that are NaN"):
            read_fp8(weight, torch.full((1, 1), 255).byte(), (128, 128), "up")
        with pytest.raises(ValueError, match=r"up has scales of torch.int64"):
            read_fp8(weight, torch.ones(1, 1).long(), (128, 128), "up")
        with pytest.raises(ValueError, match="up has blocks of 64 columns; only multiples of 128"):
            read_fp8(weight, torch.ones(1, 2), (128, 64), "up")
        for block in ((128, 128), None):
            with pytest.raises(ValueError, match=re.escape("up is [128, 128] with scales [3, 1]; they must be [1")):
                read_fp8(weight, torch.ones(3, 1), block, "up")


class TestMxfp4:
    def test_nibbles(self):
        blocks = torch.arange(16).byte().view(1, 1, 16) * 16 + 15 - torch.arange(16).byte()
        made = read_mxfp4(blocks, torch.tensor([[128]]).byte(), "w")
        assert made.codes[0, :6].tolist() == [15, 0, 14, 1, 13, 2]
        assert made.dequantize()[0, :12].tolist() == [-12, 0, -8, 1, -6, 2, -4, 3, -3, 4, -2, 6]
        assert made.format.name == "mxfp4"

    @pytest.mark.parametrize("experts", (1, 3))
    def test_what_transformers_reads(self, experts):
        mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
        blocks = integers(0, 256, experts, 10, 3, 16).byte()
        scales = integers(0, 255, experts, 10, 3).byte()
        made = read_mxfp4(blocks, scales, "w")
        theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert_exact(made.dequantize(), theirs.mT.contiguous())
        assert_exact(read_mxfp4(blocks[0].flatten(1).view(torch.int8), scales[0], "w").dequantize(), theirs[0].T)

    def test_scales_as_floats(self):
        blocks = integers(0, 256, 4, 2, 16).byte()
        wanted = read_mxfp4(blocks, torch.full((4, 2), 125).byte(), "w").dequantize()
        assert_exact(read_mxfp4(blocks, torch.full((4, 2), 0.25), "w").dequantize(), wanted)

    def test_refusals(self):
        blocks, scales = torch.zeros(4, 2, 16).byte(), torch.full((4, 2), 127).byte()
        with pytest.raises(ValueError, match=r"down has blocks of torch.int32"):
            read_mxfp4(blocks.int(), scales, "down")
        with pytest.raises(ValueError, match=re.escape("down has blocks [4, 2, 16] and scales [4, 3]")):
            read_mxfp4(blocks, torch.zeros(4, 3).byte(), "down")
        with pytest.raises(ValueError, match="down has scales that are NaN"):
            read_mxfp4(blocks, scales + 128, "down")
        with pytest.raises(ValueError, match="down has scales that are no powers of two"):
            read_mxfp4(blocks, torch.full((4, 2), 0.3), "down")


class TestGptq:
    @pytest.mark.parametrize(("group", "columns", "name"), GROUPS)
    @pytest.mark.parametrize("offset", (0, 1))
    @pytest.mark.parametrize("symmetric", (True, False))
    def test_values(self, group, columns, name, offset, symmetric):
        rows, groups = 16, math.ceil(columns / group)
        codes, scales = integers(0, 16, rows, columns), uniform(rows, groups).half()
        zeros = torch.full((rows, groups), 8) if symmetric else integers(offset, 16, rows, groups, seed=2)
        made = read_gptq(
            words(codes).T.contiguous(),
            words((zeros - offset).T),
            scales.T.contiguous(),
            torch.arange(columns).int() // group,
            group,
            "w",
            symmetric=symmetric,
            zero_offset=offset,
        )
        assert_int4(made, codes, zeros, scales, group, name if symmetric else name + "_zp")

    def test_words(self):
        """Values that AutoGPTQ gives."""
        qweight = torch.tensor([[0x76543210, -0x01234568]] * 4, dtype=torch.int32).repeat(1, 4)
        qzeros, scales = torch.tensor([[0x77777777]], dtype=torch.int32), torch.full((1, 8), 0.5).half()
        made = read_gptq(qweight, qzeros, scales, None, 32, "w", symmetric=True, zero_offset=1)
        assert made.dequantize()[0, :8].tolist() == [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5]
        assert made.dequantize()[1, :8].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]

    def test_one_group_of_all_columns(self):
        codes, scales = integers(0, 16, 8, 200), uniform(8, 1).half()
        packed, zeros = words(codes).T.contiguous(), words(torch.full((1, 8), 7))
        for order in (None, torch.empty(0), torch.zeros(200)):
            made = read_gptq(packed, zeros, scales.T, order, 0, "w", symmetric=True, zero_offset=1)
            assert_int4(made, codes, 8, scales, 200, "int4_g128")

    def test_groups_in_another_order(self):
        codes, scales, zeros = integers(0, 16, 8, 128), uniform(8, 4).half(), integers(0, 16, 8, 4, seed=2)
        order = torch.tensor([2, 0, 3, 1])
        made = read_gptq(
            words(codes).T.contiguous(),
            words(zeros.T),
            scales.T,
            order.repeat_interleave(32),
            32,
            "w",
            symmetric=False,
            zero_offset=0,
        )
        assert_int4(made, codes, zeros[:, order], scales[:, order], 32, "int4_g32_zp")

    def test_refusals(self):
        def read(order=None, zeros=7, symmetric=True, offset=1, group=32, **changed):
            tensors = {
                "qweight": torch.zeros(8, 8, dtype=torch.int32),
                "qzeros": words(torch.full((2, 8), zeros)),
                "scales": torch.ones(2, 8).half(),
            } | changed
            return read_gptq(
                *tensors.values(), order, group, "experts.3.up_proj", symmetric=symmetric, zero_offset=offset
            )

        read()
        apart = torch.arange(64) // 32
        apart[[3, 40]] = apart[[40, 3]]
        with pytest.raises(ValueError, match=r"experts.3.up_proj has columns of one group that lie apart \(desc_act"):
            read(apart)
        with pytest.raises(ValueError, match=r"groups in g_idx that are not in \[0, 2\)"):
            read(torch.arange(64) // 32 + 1)
        with pytest.raises(ValueError, match=r"g_idx is \[10\]"):
            read(torch.zeros(10))
        with pytest.raises(ValueError, match=r"has zero points other than 8, but quantization_config.sym is true"):
            read(zeros=5)
        with pytest.raises(ValueError, match=r"stores 15 for a zero point less one.*gptq_v2"):
            read(zeros=15, symmetric=False)
        assert read(zeros=15, symmetric=False, offset=0).zeros.unique().tolist() == [15]
        with pytest.raises(ValueError, match="has groups of 80 columns; only multiples of 32"):
            read(group=80, qzeros=words(torch.full((1, 8), 7)), scales=torch.ones(1, 8))
        with pytest.raises(ValueError, match=r"scales is \[3, 8\]; .* it must be \[2, 8\]"):
            read(scales=torch.ones(3, 8))
        with pytest.raises(ValueError, match=r"qzeros is \[2, 2\]; .* it must be \[2, 1\]"):
            read(qzeros=torch.zeros(2, 2, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"qweight is \[8, 8\] of torch.int64; it must be a matrix of int32"):
            read(qweight=torch.zeros(8, 8).long())


class TestAwq:
    @pytest.mark.parametrize(("group", "columns", "name"), GROUPS)
    @pytest.mark.parametrize("rows", (8, 24))
    def test_values(self, group, columns, name, rows):
        groups = math.ceil(columns / group)
        codes, zeros = integers(0, 16, rows, columns), integers(0, 16, rows, groups, seed=2)
        scales = uniform(rows, groups).half()

        def pack(per_row: Tensor) -> Tensor:
            return words(per_row.T.unflatten(1, (-1, 8))[..., (0, 2, 4, 6, 1, 3, 5, 7)].flatten(1))

        made = read_awq(pack(codes), pack(zeros), scales.T.contiguous(), group, "w")
        assert_int4(made, codes, zeros, scales, group, name + "_zp")

    def test_words(self):
        """Values that AutoAWQ gives."""
        qweight = torch.tensor([[0x76543210, 0x75316420]], dtype=torch.int32).expand(32, 2)
        zeros = torch.zeros(1, 2, dtype=torch.int32)
        made = read_awq(qweight, zeros, torch.ones(1, 16).half(), 32, "w")
        assert made.dequantize()[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 0, 1, 2, 3, 4, 5, 6, 7]

    def test_refusals(self):
        qweight, zeros = torch.zeros(64, 1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"up: scales is \[2, 9\]; .* it must be \[2, 8\]"):
            read_awq(qweight, zeros, torch.ones(2, 9), 32, "up")
        with pytest.raises(ValueError, match=r"up: qzeros is \[2, 1\]; .* it must be \[1, 1\]"):
            read_awq(qweight, zeros, torch.ones(1, 8), 64, "up")
        with pytest.raises(ValueError, match=r"up: qweight is .* of torch.float16"):
            read_awq(qweight.half(), zeros, torch.ones(2, 8), 32, "up")
        with pytest.raises(ValueError, match="up has scales that are NaN"):
            read_awq(qweight, zeros, torch.full((2, 8), torch.nan), 32, "up")


class TestPackedInt4:
    @pytest.mark.parametrize(("group", "columns", "name"), GROUPS)
    @pytest.mark.parametrize("shape", ((8,), (13,), (3, 11)))
    @pytest.mark.parametrize("symmetric", (True, False))
    def test_values(self, group, columns, name, shape, symmetric):
        groups = math.ceil(columns / group)
        codes, scales = integers(0, 16, *shape, columns), uniform(*shape, groups).bfloat16()
        zeros = integers(0, 16, *shape, groups, seed=2)
        packed_zeros = None if symmetric else words(zeros.mT).mT
        made = read_packed_int4(words(codes), scales, packed_zeros, None, columns, group, "w")
        assert_int4(made, codes, 8 if symmetric else zeros, scales, group, name if symmetric else name + "_zp")

    def test_words(self):
        """Words that compressed-tensors packs, of rows and of zero points."""
        values = torch.tensor([[(3 * i + 5 * r) % 16 - 8 for i in range(10)] for r in range(3)])
        packed = torch.tensor([[1392285232, 184], [-1488852091, 13], [-57265958, 82]], dtype=torch.int32)
        made = read_packed_int4(packed, torch.ones(3, 1), None, None, 10, 0, "w")
        assert_exact(made.dequantize(), values.float())
        zeros = torch.tensor([[2640, 3459, 182, 1001, 1564, 2383, 3186, 4005, 728, 1291]], dtype=torch.int32)
        codes = words(torch.full((3, 320), 8))
        made = read_packed_int4(codes, torch.ones(3, 10), zeros, None, 320, 32, "w")
        assert torch.equal(made.zeros.long(), values + 8)

    def test_one_group_of_all_columns(self):
        codes, scales = integers(0, 16, 8, 200), uniform(8, 1)
        made = read_packed_int4(words(codes), scales, None, None, 200, 0, "w")
        assert_int4(made, codes, 8, scales, 200, "int4_g128")

    def test_groups_in_another_order(self):
        codes, scales, order = integers(0, 16, 8, 128), uniform(8, 4), torch.tensor([2, 0, 3, 1])
        made = read_packed_int4(words(codes), scales, None, order.repeat_interleave(32), 128, 32, "w")
        assert_int4(made, codes, 8, scales[:, order], 32, "int4_g32")

    def test_refusals(self):
        packed = torch.zeros(8, 8, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"up: weight_packed is \[8, 8\]; .* it must be \[8, 9\]"):
            read_packed_int4(packed, torch.ones(8, 2), None, None, 65, 32, "up")
        with pytest.raises(ValueError, match=r"up: weight_scale is \[8, 2\]; .* it must be \[8, 1\]"):
            read_packed_int4(packed, torch.ones(8, 2), None, None, 64, 64, "up")
        with pytest.raises(ValueError, match=r"up: weight_zero_point is \[8, 2\]; .* it must be \[1, 2\]"):
            read_packed_int4(packed, torch.ones(8, 2), packed[:, :2], None, 64, 32, "up")
        with pytest.raises(ValueError, match="up has columns of one group that lie apart"):
            read_packed_int4(packed, torch.ones(8, 2), None, torch.arange(64) % 2, 64, 32, "up")
