"""An expert's bytes become what the kernels read, and the same bytes again."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import Layer, random_layer

pytest.importorskip("triton")

from ktcompile import _native
from ktcompile.ops import Activation, PackedExperts
from ktcompile.ops.triton import DeviceWeight, device_weight
from ktcompile.ops.triton.transport import ExpertLayout, ExpertMemory
from ktcompile.quant import FORMATS, QuantizedWeight

CPU = torch.device("cpu")
WITH_KERNELS = [name for name, f in FORMATS.items() if not f.dynamic]
# (experts, hidden, intermediate): of one step of 128 columns and less, and of more than one, with rests of all kinds
SIZES = [(2, 72, 56), (2, 200, 136), (2, 129, 257)]
KINDS = [(Activation("silu"), False), (Activation("silu"), True), (Activation("relu", False), False)]


@pytest.fixture(params=[1, 2], ids=["one slice", "two slices"])
def slices(request, monkeypatch) -> int:
    monkeypatch.setattr(_native, "numa_nodes", lambda: [-1] * request.param)
    return request.param


def raw_bytes(experts: PackedExperts, expert: int) -> torch.Tensor:
    raw = torch.full((sum(experts.native.parts) + 1,), 0xA5, dtype=torch.uint8)
    experts.native.read(expert, raw.data_ptr())
    assert raw[-1] == 0xA5
    return raw[:-1]


def sent(experts: PackedExperts, expert: int, slot: int) -> tuple[ExpertLayout, ExpertMemory]:
    layout = ExpertLayout.of(experts)
    memory = layout.memory(3, CPU)
    for tensor in memory.tensors():
        tensor.view(torch.uint8).fill_(0xFF)
    layout.unpack(raw_bytes(experts, expert), *memory.slot(slot))
    return layout, memory


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("weight_format", WITH_KERNELS)
def test_the_kernels_get_the_weights_of_the_source(weight_format, sizes, slices):
    for activation, interleaved in KINDS:
        layer = random_layer(
            weight_format=weight_format, activation=activation, interleaved=interleaved, bias=True, sizes=sizes
        )
        experts = layer.pack()
        assert len(experts.native.slices) == min(slices, -(-sizes[2] // 128))
        _, memory = sent(experts, 1, 2)
        for weight, found in ((layer.gate_up, memory.gate_up), (layer.down, memory.down)):
            order = _gate_first(weight.shape[1]) if interleaved and weight is layer.gate_up else slice(None)
            _assert_same(_wanted(layer, weight[1:], order), found, 2)
        order = _gate_first(layer.gate_up.shape[1]) if interleaved else slice(None)
        assert torch.equal(memory.gate_up_bias[2], layer.gate_up_bias[1][order])
        assert torch.equal(memory.down_bias[2], layer.down_bias[1])


def _gate_first(rows: int) -> torch.Tensor:
    return torch.cat([torch.arange(0, rows, 2), torch.arange(1, rows, 2)])


def _wanted(layer: Layer, weight: torch.Tensor, order: torch.Tensor | slice) -> DeviceWeight:
    record = FORMATS[layer.spec.weight_format]
    if record.storage:
        return device_weight(weight.to(record.storage)[:, order], CPU)
    quantized = record.quantize(weight)
    zeros = None if quantized.zeros is None else quantized.zeros[:, order]
    return device_weight(QuantizedWeight(record, quantized.codes[:, order], quantized.scales[:, order], zeros), CPU)


def _assert_same(wanted: DeviceWeight, found: DeviceWeight, slot: int) -> None:
    assert torch.equal(found.codes[slot], wanted.codes[0])
    for a, b in ((wanted.scales, found.scales), (wanted.zeros, found.zeros)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a[0].float(), b[slot].float())
    assert (found.codes.view(torch.uint8)[:slot] == 0xFF).all()  # nothing else was written


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("weight_format", WITH_KERNELS)
def test_bytes_come_back(weight_format, sizes, slices):
    for activation in (Activation("silu"), Activation("relu", False)):
        experts = random_layer(weight_format=weight_format, activation=activation, bias=True, sizes=sizes).pack()
        layout, memory = sent(experts, 0, 1)
        before = [raw_bytes(experts, e) for e in range(2)]
        back = layout.pack(*memory.slot(1))
        weights = [
            torch.equal(a, b) for a, b in zip(back.split(layout.parts), before[0].split(layout.parts), strict=True)
        ]
        assert all(weights[::2]) and len(back) == layout.nbytes
        experts.native.release(0)
        experts.native.fill(0, 0xFF)
        experts.native.write(0, back.data_ptr())
        assert all(torch.equal(raw_bytes(experts, e), before[e]) for e in range(2))  # with its bias, and the other


def test_scales_of_fp16_stay_fp16():
    """A checkpoint's, where those that are made here are bf16."""
    layer = random_layer(weight_format="int4_g32")
    record = FORMATS["int4_g32"]
    weights = []
    for weight in (layer.gate_up, layer.down):
        q = record.quantize(weight)
        weights.append(QuantizedWeight(record, q.codes, (q.scales * 1.001).half().float()))
    experts = PackedExperts(*weights, None, None, layer.spec)
    layout, memory = sent(experts, 2, 0)
    assert layout.scale_dtype == torch.float16 and not memory.gate_up_bias
    assert torch.equal(memory.down.scales[0].float(), weights[1].scales[2].mT)
    assert torch.equal(layout.pack(*memory.slot(0)), raw_bytes(experts, 2))


def test_a_format_without_kernels_is_refused():
    with pytest.raises(ValueError, match=r"int8_dyn, which has no GPU kernel; these have: fp32, .*mxfp4"):
        ExpertLayout.of(random_layer(weight_format="int8_dyn").pack())
