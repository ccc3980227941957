"""The weights of a checkpoint in a folder, as they are stored or dequantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktcompile.models.checkpoint import Shards
from ktcompile.quant import QuantizedWeight
from ktcompile.quant.checkpoints import Reader, detect, parameters

# Weights that are dequantised at once; fp32 takes four bytes each.
_SLICE = 1 << 22


def reader_of(model: str | Path) -> Reader | None:
    """Return what reads the weights of the model in a directory; None if they are not quantised, or if `model` is not
    a directory. ValueError: they are quantised in a way that is not supported."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        return detect(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A checkpoint on disk. reader: of what is quantised in it; None: nothing is."""

    folder: Path
    shards: Shards
    reader: Reader | None

    @classmethod
    def open(cls, folder: Path) -> StoredModel:
        """Open the checkpoint in a folder. Errors as for `Shards` and `reader_of`."""
        return cls(folder, Shards(folder), reader_of(folder))

    def parameters(self) -> dict[str, str | None]:
        """Return the names of the parameters that are stored, each with the name of its quantised weight or None."""
        if self.reader is None:
            return dict.fromkeys(self.shards)
        return parameters(self.reader, self.shards)

    def read(self, weight: str) -> QuantizedWeight:
        """Return a quantised weight as it is stored. ValueError: it cannot be read; names its file."""
        assert self.reader is not None
        try:
            return self.reader.read(self.shards, weight)
        except ValueError as error:
            raise ValueError(f"{self.shards.file(weight)}: {error}") from error

    def dequantized(self, weight: str, dtype: torch.dtype) -> Tensor:
        """Return a quantised weight as a plain tensor. Errors as for `read`."""
        quantized = self.read(weight)
        rows, columns = quantized.shape[:-1].numel(), quantized.shape[-1]
        flat = [None if t is None else t.reshape(rows, -1) for t in (quantized.scales, quantized.zeros)]
        codes, (scales, zeros) = quantized.codes.reshape(rows, columns), flat
        assert scales is not None
        result = torch.empty(rows, columns, dtype=dtype)
        step = max(1, _SLICE // columns)
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            some = QuantizedWeight(quantized.format, codes[part], scales[part], None if zeros is None else zeros[part])
            result[part] = some.dequantize()
        return result.view(quantized.shape)

    def plain(self, name: str) -> Tensor:
        """Return a tensor that is not quantised. Errors as for `check_plain`, and of reading."""
        self.check_plain(name)
        return self.shards[name]

    def check_plain(self, name: str) -> None:
        """ValueError: a tensor holds codes of which the scales are missing."""
        dtype = self.shards.dtype(name)
        if dtype.itemsize > 1 or dtype == torch.bool:
            return
        if self.reader is not None:
            self.read(name.removesuffix(".weight"))  # says what is missing
        raise ValueError(f"{self.shards.file(name)}: {name} is {dtype} without scales")

    def lazy(self, name: str, weight: str | None, dtype: torch.dtype) -> LazyTensor:
        """Return what transformers can read a parameter from. weight: as from `parameters`. dtype: of dequantised
        ones."""
        return LazyTensor(partial(self.dequantized, weight, dtype) if weight else partial(self.plain, name))

    def first_float(self) -> torch.dtype | None:
        """Return the dtype of the first tensor of numbers with a fraction."""
        dtypes = (self.shards.dtype(name) for name in self.shards)
        return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), None)


class LazyTensor:
    """Stands for a tensor until transformers takes a slice of it, as of a file."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]
