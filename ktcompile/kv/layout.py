"""How many bytes keys and values take, and how many blocks a budget holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer keeps of each position.

    num_heads: of keys. key_dim, value_dim: of a head; value_dim is 0 where values are a part of the keys, as the
    latents of MLA are (one head of 512 + 64). element_bytes: of an element. scale_bytes: of what goes with a head of
    keys, or of values, at one position; 0 where elements are not quantised. latent_dim: how much of the keys is values
    too, where value_dim is 0.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    element_bytes: int
    scale_bytes: int = 0
    latent_dim: int = 0

    def __post_init__(self) -> None:
        if min(self.num_heads, self.key_dim, self.element_bytes) < 1 or min(self.value_dim, self.scale_bytes) < 0:
            raise ValueError(f"{self} has sizes that cannot be; only value_dim and scale_bytes may be 0")
        if not 0 <= self.latent_dim <= self.key_dim or (self.latent_dim and self.value_dim):
            raise ValueError(f"{self} has values that are no part of its keys, or others beside these")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one position."""
        rows = 2 if self.value_dim else 1
        return self.num_heads * ((self.key_dim + self.value_dim) * self.element_bytes + rows * self.scale_bytes)


def block_bytes(layers: Iterable[LayerKV], block_size: int) -> int:
    """Return the bytes of a block of `block_size` positions in all layers together."""
    return block_size * sum(layer.bytes_per_token for layer in layers)


def num_blocks(budget: int, layers: Iterable[LayerKV], block_size: int) -> int:
    """Return how many blocks `budget` bytes hold. ValueError: not one, or there is nothing to keep."""
    size = block_bytes(layers, block_size)
    if size == 0:
        raise ValueError("no layer keeps keys and values, so a budget holds any number of blocks")
    if budget < size:
        raise ValueError(f"the cache has {budget:,} bytes; one block of {block_size} positions takes {size:,}")
    return budget // size


def blocks_for(positions: int, block_size: int) -> int:
    """Return how many blocks `positions` positions take."""
    return -(-positions // block_size)
