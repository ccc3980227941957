"""Blocks of keys and values of all layers, as bytes: the payloads of the tiers. The one module here that knows torch.

Shape suffixes: N blocks, P positions of a block, J heads of keys, D size of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class StoredLayer(Protocol):
    """Storage of one layer, as of `ktcompile.ops.PagedKV`."""

    @property
    def key(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def key_scales(self) -> Tensor | None: ...
    @property
    def value_scales(self) -> Tensor | None: ...


class BlockMemory:
    """The blocks of a device's storage, each as one payload: of each layer keys, values, then their scales.

    What is a part of other storage, as the values of latents are, is in the payload once. block_bytes: of a payload.
    layout: what is in it, for the header of a record. width: bytes of most of its elements. ValueError: a block of a
    layer does not lie together in memory of the CPU, or layers have different numbers of blocks.
    """

    def __init__(self, layers: Sequence[StoredLayer]) -> None:
        parts = [_parts(layer) for layer in layers]
        tensors = [tensor for layer in parts for _, tensor in layer]
        if not tensors or len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError("there are no layers, or their storage has different numbers of blocks")
        # Views that share the memory of the storage; a block is a row.
        self._rows = [_rows(tensor_NPJD) for tensor_NPJD in tensors]
        self.num_blocks = len(tensors[0])
        self.block_bytes = sum(rows.shape[1] for rows in self._rows)
        self._ends = list(accumulate(rows.shape[1] for rows in self._rows[:-1]))
        self.layout = "; ".join(
            f"{len(list(same))} x {text}" for text, same in groupby(", ".join(map(_text, layer)) for layer in parts)
        )
        widths = {tensor.element_size() for tensor in tensors}
        self.width = 1 if len(widths) > 1 else widths.pop()

    def read(self, block: int, out: memoryview) -> None:
        """Copy a block to `out`, of `block_bytes`."""
        for rows, part in zip(self._rows, self._split(out), strict=True):
            np.copyto(part, rows[block])

    def write(self, block: int, payload: memoryview) -> None:
        """Copy what `read` gave to a block."""
        for rows, part in zip(self._rows, self._split(payload), strict=True):
            np.copyto(rows[block], part)

    def _split(self, memory: memoryview) -> list[npt.NDArray[np.uint8]]:
        assert len(memory) == self.block_bytes, f"a payload has {len(memory)} bytes of {self.block_bytes}"
        return np.split(np.frombuffer(memory, np.uint8), self._ends)


def _parts(layer: StoredLayer) -> list[tuple[str, Tensor]]:
    parts = [("key", layer.key)]
    if layer.value.untyped_storage().data_ptr() != layer.key.untyped_storage().data_ptr():
        parts.append(("value", layer.value))
    if layer.key_scales is not None:
        parts.append(("key_scales", layer.key_scales))
        scales = layer.value_scales
        if scales is not None and scales.untyped_storage().data_ptr() != layer.key_scales.untyped_storage().data_ptr():
            parts.append(("value_scales", scales))
    return parts


def _rows(tensor_NPJD: Tensor) -> npt.NDArray[np.uint8]:
    """Return the memory of storage, a block in a row. Copies are numpy's: torch would start threads for them."""
    if not tensor_NPJD.is_contiguous() or tensor_NPJD.device.type != "cpu":
        raise ValueError(f"a block of {list(tensor_NPJD.shape[1:])} does not lie together in memory of the CPU")
    rows: npt.NDArray[np.uint8] = tensor_NPJD.view(len(tensor_NPJD), -1).view(torch.uint8).numpy()
    return rows


def _text(part: tuple[str, Tensor]) -> str:
    name, tensor = part
    return f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape[1:])}"
