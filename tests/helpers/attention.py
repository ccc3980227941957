"""Random queries, keys and values, in memory that is NaN around them.

Shape suffixes: B sequences, H heads of queries, J heads of keys, Q queries, S positions, D size of a key, V size of a
value, N blocks, P positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    sequences: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 5
    positions: int = 70
    key_size: int = 16
    value_size: int = 16


def poisoned(x: Tensor) -> Tensor:
    """Return a copy that lies in memory which is NaN, or -128, before and after each row and each head."""
    *outer, rows, columns = x.shape
    memory = x.new_full((*outer, rows + 3, columns + 5), poison(x.dtype))
    inside = memory[..., 1 : 1 + rows, 2 : 2 + columns]
    inside.copy_(x)
    return inside


def poison(dtype: torch.dtype) -> float:
    """Return NaN, or a number that no code of int8 is."""
    return torch.nan if dtype.is_floating_point else -128


def random_inputs(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Return poisoned query [B, H, Q, D], key [B, J, S, D] and value [B, J, S, V]."""
    generator = torch.Generator().manual_seed(seed + sum((shape.queries, shape.positions, shape.key_size)))
    s = shape
    sizes = (
        (s.sequences, s.heads, s.queries, s.key_size),
        (s.sequences, s.kv_heads, s.positions, s.key_size),
        (s.sequences, s.kv_heads, s.positions, s.value_size),
    )
    return Inputs(*(poisoned(torch.randn(size, generator=generator).to(dtype)) for size in sizes))


def in_blocks(x_BJSD: Tensor, lengths: list[int], table: Tensor, block_size: int) -> Tensor:
    """Return storage [N, P, J, D], poisoned but for the positions of each sequence, where its row of `table` says."""
    shape = (int(table.max()) + 2, block_size, x_BJSD.shape[1], x_BJSD.shape[3])
    blocks = x_BJSD.new_full(shape, poison(x_BJSD.dtype))
    for b, length in enumerate(lengths):
        for p in range(length):
            blocks[table[b, p // block_size], p % block_size] = x_BJSD[b, :, p]
    return blocks
