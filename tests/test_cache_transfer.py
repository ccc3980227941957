"""Blocks of storage as bytes, and back bit for bit."""

from __future__ import annotations

import pytest
import torch

from ktcompile.cache.transfer import BlockMemory
from ktcompile.ops.kv import KV_FORMATS, PagedKV


def storage(kv_format: str, latents: bool, layers: int = 3, blocks: int = 5) -> list[PagedKV]:
    made = []
    for _ in range(layers):
        if latents:
            made.append(PagedKV.empty_latents(KV_FORMATS[kv_format], blocks, 4, 128, 64))
        else:
            made.append(PagedKV.empty(KV_FORMATS[kv_format], blocks, 4, 2, 64, 32))
    return made


def fill(layers: list[PagedKV], seed: int) -> None:
    """Write random bytes, NaNs of all kinds among them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for tensor in (layer.key, layer.value, layer.key_scales, layer.value_scales):
            if tensor is not None and tensor.is_contiguous():
                raw = tensor.view(torch.uint8)
                raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))


def bits(layers: list[PagedKV], block: int) -> list[torch.Tensor]:
    tensors = [t for x in layers for t in (x.key, x.value, x.key_scales, x.value_scales) if t is not None]
    return [tensor[block].contiguous().view(torch.uint8).clone() for tensor in tensors]


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_block_comes_back_bit_for_bit(kv_format, latents):
    """Museum 9: scales are in the payload of what they scale."""
    layers = storage(kv_format, latents)
    fill(layers, 0)
    memory = BlockMemory(layers)
    rows = (128,) if latents else (64, 64, 32, 32)
    assert memory.block_bytes == 3 * 4 * sum(map(KV_FORMATS[kv_format].row_bytes, rows))
    before = [bits(layers, block) for block in range(5)]
    payload = memoryview(bytearray(memory.block_bytes))
    memory.read(2, payload)
    fill(layers, 1)
    now = [bits(layers, block) for block in range(5)]
    memory.write(4, payload)
    for got, wanted in zip(bits(layers, 4), before[2], strict=True):
        assert torch.equal(got, wanted)
    for block in range(4):
        for got, wanted in zip(bits(layers, block), now[block], strict=True):
            assert torch.equal(got, wanted), "another block has changed"


def test_layouts_tell_formats_and_shapes_apart():
    layouts = {BlockMemory(storage(f, latents, n)).layout for f in KV_FORMATS for latents in (0, 1) for n in (1, 2)}
    assert len(layouts) == 2 * 2 * len(KV_FORMATS)
    assert BlockMemory(storage("bf16", False)).layout == "3 x key bfloat16[4, 2, 64], value bfloat16[4, 2, 32]"


def test_the_width_is_that_of_elements():
    widths = {name: BlockMemory(storage(name, False)).width for name in KV_FORMATS}
    assert widths == {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "int8_g32": 1}


def test_a_payload_of_another_size_is_refused():
    memory = BlockMemory(storage("bf16", False))
    with pytest.raises(AssertionError, match="has 7 bytes"):
        memory.read(0, memoryview(bytearray(7)))


def test_storage_that_does_not_lie_together_is_refused():
    layer = storage("bf16", False)[0]
    with pytest.raises(ValueError, match="does not lie together"):
        BlockMemory([PagedKV(layer.key.transpose(1, 2), layer.value)])
    with pytest.raises(ValueError, match="different numbers"):
        BlockMemory([layer, PagedKV(layer.key[:2], layer.value[:2])])
