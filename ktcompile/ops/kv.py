"""Keys and values between calls: storage in blocks, in floating point or int8, and the operator `kt::store_kv`.

Shape suffixes: T tokens, H heads of queries, J heads of keys, N blocks, P positions of a block, D size of a row (of a
key, or of a value), V size of a value, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktcompile.machine import machine
from ktcompile.ops.attention import paged_attention
from ktcompile.ops.attention_checks import check_scales
from ktcompile.ops.library import LIBRARY
from ktcompile.ops.threads import native_threads
from ktcompile.quant import native_dtype

LIBRARY.define(
    "store_kv(Tensor rows, Tensor slot_mapping, Tensor(a!) codes, Tensor(b!) scales) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What keys and values are stored as. group: elements of a row that share a scale, for int8: all of them where it
    is 0 or does not divide the row."""

    name: str
    dtype: torch.dtype
    group: int = 0

    def groups(self, size: int) -> int:
        """Return how many scales a row of `size` elements has."""
        if self.dtype != torch.int8:
            return 0
        return size // self.group if self.group and size % self.group == 0 else 1

    def holds_latents(self, key_size: int, value_size: int) -> bool:
        """Return whether no scale is both for values, the first elements of a key, and for others, but for all."""
        groups = self.groups(key_size)
        return groups < 2 or value_size % (key_size // groups) == 0

    def row_bytes(self, size: int) -> int:
        """Return the bytes of a row of `size` elements with its scales."""
        return size * self.dtype.itemsize + self.groups(size) * torch.float32.itemsize


KV_FORMATS = {
    f.name: f
    for f in (
        KVFormat("fp32", torch.float32),
        KVFormat("fp16", torch.float16),
        KVFormat("bf16", torch.bfloat16),
        KVFormat("int8", torch.int8, 64),
        KVFormat("int8_g32", torch.int8, 32),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class PagedKV:
    """The keys and values of one layer in blocks.

    key: [N, P, J, D]. value: [N, P, J, V], which may be a part of `key`. Both of one dtype; where that is int8 they are
    codes, and key_scales and value_scales are float32 [N, P, J, G]. A slot is block * P + position.
    """

    key: Tensor
    value: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def empty(
        cls, kv_format: KVFormat, num_blocks: int, block_size: int, kv_heads: int, key_size: int, value_size: int
    ) -> PagedKV:
        """Return storage for `num_blocks` * `block_size` positions; nothing is in it."""
        key, key_scales = _empty(kv_format, (num_blocks, block_size, kv_heads, key_size))
        value, value_scales = _empty(kv_format, (num_blocks, block_size, kv_heads, value_size))
        return cls(key, value, key_scales, value_scales)

    @classmethod
    def empty_latents(
        cls, kv_format: KVFormat, num_blocks: int, block_size: int, key_size: int, value_size: int
    ) -> PagedKV:
        """Return storage with one head of keys, whose first `value_size` elements are the values. ValueError: a scale
        would be for values and for other elements of a key, but not for all."""
        key, key_scales = _empty(kv_format, (num_blocks, block_size, 1, key_size))
        value = key[..., :value_size]
        if key_scales is None:
            return cls(key, value)
        groups = key_scales.shape[3]
        if not kv_format.holds_latents(key_size, value_size):
            each = key_size // groups
            raise ValueError(f"{kv_format.name} has a scale for each {each} elements of a key; values are {value_size}")
        return cls(key, value, key_scales, key_scales[..., : max(1, value_size * groups // key_size)])

    def store(self, key_TJD: Tensor, value_TJV: Tensor | None, slot_mapping: Tensor) -> None:
        """Write the rows of tokens into their slots, quantised where storage is int8.

        value_TJV: None where values are a part of keys. slot_mapping: int64 [T]; a negative slot is left out, and
        no other may be there twice. ValueError: a shape, dtype or slot cannot be.
        """
        store_kv(key_TJD, slot_mapping, self.key, self.key_scales)
        if value_TJV is not None:
            store_kv(value_TJV, slot_mapping, self.value, self.value_scales)

    def attention(
        self, query_THD: Tensor, block_table: Tensor, lengths: Tensor, query_starts: Tensor, **rule: Any
    ) -> Tensor:
        """Return `paged_attention` over what is stored, [T, H, V]. rule: its sinks, window, scale, softcap and isa."""
        return paged_attention(
            query_THD,
            self.key,
            self.value,
            block_table,
            lengths,
            query_starts,
            key_scales=self.key_scales,
            value_scales=self.value_scales,
            **rule,
        )


def store_kv(rows_TJD: Tensor, slot_mapping: Tensor, blocks_NPJD: Tensor, scales_NPJG: Tensor | None = None) -> None:
    """Write rows of keys or of values into their slots of storage in blocks, quantised where that is int8.

    rows: fp32, fp16 or bf16. slot_mapping: int64 [T], block * P + position, none twice; negative: not stored. scales:
    float32 [N, P, J, G] for int8, those of a row together. The scale of a group is m / 127, m its largest magnitude,
    its codes are its elements times 127 / m, rounded to the nearest, halves to even, all in fp32; below 2**-100 both
    are zero, and where an element is not finite the scale is NaN. ValueError: a shape, dtype or slot cannot be.
    """
    _check(rows_TJD, slot_mapping, blocks_NPJD)
    check_scales("the storage", blocks_NPJD, scales_NPJG)
    if scales_NPJG is not None:
        torch.ops.kt.store_kv(rows_TJD, slot_mapping, blocks_NPJD, scales_NPJG)
        return
    stored = slot_mapping >= 0
    if not stored.all():
        rows_TJD, slot_mapping = rows_TJD[stored], slot_mapping[stored]
    block_size = blocks_NPJD.shape[1]
    blocks_NPJD[slot_mapping // block_size, slot_mapping % block_size] = rows_TJD.to(blocks_NPJD.dtype)


@torch.library.impl(LIBRARY, "store_kv", "CPU")
def _store_kv_cpu(rows_TJD: Tensor, slot_mapping: Tensor, codes_NPJD: Tensor, scales_NPJG: Tensor) -> None:
    _check(rows_TJD, slot_mapping, codes_NPJD)
    if check_scales("the storage", codes_NPJD, scales_NPJG) is not scales_NPJG or codes_NPJD.stride(3) != 1:
        raise ValueError("the storage has rows or scales of rows that do not lie together")
    rows_TJD = rows_TJD if rows_TJD.stride(2) == 1 else rows_TJD.contiguous()
    tokens, heads, size = rows_TJD.shape
    slot_mapping = slot_mapping.contiguous()
    native_threads().context().store_kv(
        machine().isa,
        (tokens, heads, size, size // scales_NPJG.shape[3]),
        native_dtype(rows_TJD.dtype, "rows"),
        (rows_TJD.data_ptr(), rows_TJD.stride(0), rows_TJD.stride(1)),
        slot_mapping.data_ptr(),
        codes_NPJD.shape[1],
        (codes_NPJD.data_ptr(), codes_NPJD.stride(0), codes_NPJD.stride(2), codes_NPJD.stride(1)),
        (scales_NPJG.data_ptr(), scales_NPJG.stride(0), scales_NPJG.stride(2), scales_NPJG.stride(1)),
    )


@torch.library.register_fake("kt::store_kv", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _store_kv_fake(rows: Tensor, slot_mapping: Tensor, codes: Tensor, scales: Tensor) -> None:
    return None


def _empty(kv_format: KVFormat, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor | None]:
    groups = kv_format.groups(shape[3])
    return torch.empty(shape, dtype=kv_format.dtype), torch.empty(*shape[:3], groups) if groups else None


def _check(rows: Tensor, slot_mapping: Tensor, blocks: Tensor) -> None:
    if rows.dim() != 3 or blocks.dim() != 4 or rows.shape[1:] != blocks.shape[2:] or 0 in blocks.shape[1:]:
        wanted = "[tokens, heads, size] and [blocks, block size, heads, size]"
        raise ValueError(f"rows are {list(rows.shape)} and the storage {list(blocks.shape)}; they must be {wanted}")
    native_dtype(rows.dtype, "rows")
    if slot_mapping.shape != rows.shape[:1] or slot_mapping.dtype != torch.int64:
        found = f"{list(slot_mapping.shape)} of {slot_mapping.dtype}"
        raise ValueError(f"slot_mapping is {found}; it must be [{rows.shape[0]}] of torch.int64")
    if any(x.device.type != "cpu" for x in (rows, slot_mapping, blocks)):
        raise ValueError(f"rows are on {rows.device} and the storage on {blocks.device}; both must be on the CPU")
    slots = blocks.shape[0] * blocks.shape[1]
    if len(slot_mapping) and int(slot_mapping.max()) >= slots:
        raise ValueError(f"slot_mapping has {int(slot_mapping.max())}; it must be below {slots}")
