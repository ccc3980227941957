"""The weights of a layer's experts as a checkpoint has them: one tensor, or parts that lie in several.

Shape suffixes: E experts, N rows of an expert.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile.models.checkpoint import Shards
from ktcompile.models.model_names import ModelNames
from ktcompile.models.stored_model import StoredModel
from ktcompile.ops.weights import StoredWeight
from ktcompile.quant import QuantizedWeight
from ktcompile.quant.checkpoints import place_rows

# Names that an error lists.
_SHOWN = 5


class UnknownLayoutError(Exception):
    """transformers makes the parameter of something else than rows of stored tensors; the message says of what."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stored parameter that goes into one of the model. weight: its name for the reader, None if it is not
    quantised. pattern: as from `ModelNames.find`."""

    name: str
    weight: str | None
    pattern: str | None


@dataclass(frozen=True, slots=True)
class ExpertsParameter:
    """A parameter of the model for all experts, and the stored ones of which it is made: all are quantised, or none."""

    name: str
    parts: tuple[Part, ...]

    def check(self, source: StoredModel, names: ModelNames) -> None:
        """ValueError: parts of experts are missing; or, of weights that are not quantised, a shape or dtype does not
        fit. UnknownLayoutError."""
        self._check_all_experts(source, names)
        if self.parts[0].weight is not None:
            return
        for part in self.parts:
            source.check_plain(part.name)
            if not source.shards.dtype(part.name).is_floating_point:
                where = f"{source.shards.file(part.name)}: {part.name}"
                raise ValueError(f"{where} is {source.shards.dtype(part.name)}; a weight of experts has a fraction")
        shapes = [source.shards.shape(part.name) for part in self.parts]
        self._check_alike([f"{list(shape)}" for shape in shapes], source)
        self._rows(shapes, names.parameters[self.name].shape, source, names)

    def quantized(self, source: StoredModel, names: ModelNames, transposed: bool) -> QuantizedWeight:
        """Return the weight, [E, out, in]. transposed: the parameter itself is [E, in, out]."""
        wanted = names.parameters[self.name]
        shape = wanted.mT.shape if transposed else wanted.shape
        weights = [source.read(part.weight) for part in self.parts if part.weight is not None]
        self._check_alike([f"{list(w.shape)} in {w.format.name}" for w in weights], source)
        shapes = [w.shape for w in weights]
        if self.parts[0].pattern is None and len(weights) == 1:
            (result,) = weights
        else:
            try:
                places = _places(self._rows(shapes, shape, source, names), shapes)
            except UnknownLayoutError as error:
                raise ValueError(f"{self._where(source)}: {error}") from error
            try:
                result = place_rows(weights, places, (shape[0], shape[1]))
            except ValueError as error:
                raise ValueError(f"{self._where(source)}: {error}") from error
        if result.shape != shape:
            raise ValueError(self._wrong(source, list(result.shape), shape))
        return result

    def plain(self, source: StoredModel, names: ModelNames, transposed: bool, dtype: torch.dtype) -> StoredWeight:
        """Return the weight, [E, out, in], none of which is read yet. transposed: as for `quantized`."""
        wanted = names.parameters[self.name].shape
        shapes = [source.shards.shape(part.name) for part in self.parts]
        rows_EN = self._rows(shapes, wanted, source, names)
        read = _ExpertReader(source.shards, [part.name for part in self.parts], rows_EN, wanted[2], dtype, transposed)
        return StoredWeight(torch.Size((wanted[0], wanted[2], wanted[1])) if transposed else wanted, dtype, read)

    def _rows(self, shapes: Sequence[torch.Size], wanted: torch.Size, source: StoredModel, names: ModelNames) -> Tensor:
        """Return for each row of the parameter which one of its parts' it is, counted over all of them.

        transformers' own conversion is run on the numbers of the rows in place of the weights.
        """
        pattern = self.parts[0].pattern
        if pattern is None:
            if len(self.parts) > 1:
                raise ValueError(f"{self._where(source)} stands for {self.name}, as other tensors do")
            if shapes[0] != wanted:
                raise ValueError(self._wrong(source, list(shapes[0]), wanted))
            return torch.arange(wanted[0] * wanted[1]).view(wanted[:2])
        distinct = [list(shape) for shape in sorted(set(shapes))]
        problem = f"{len(shapes)} weights of {distinct} do not make {self.name} {list(wanted)}"
        if sum(shape.numel() for shape in shapes) != wanted.numel():
            raise ValueError(f"{self._where(source)}: {problem}")
        unknown = (
            f"{self.name.rpartition('.')[2]} {list(wanted)} is not made of rows of {len(shapes)} weights of {distinct}"
        )
        try:
            order = self._converted(shapes, pattern, names)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UnknownLayoutError(f"{unknown} ({error})") from error
        rows = sum(shape[:-1].numel() for shape in shapes)
        columns = {shape[-1] for shape in shapes}
        fits = order.shape == (*wanted[:2], 1) and order.numel() == rows and columns == {wanted[2]}
        if not fits or order.unique().numel() != rows:  # type: ignore[no-untyped-call]
            raise UnknownLayoutError(unknown)
        return order.squeeze(-1)

    def _converted(self, shapes: Sequence[torch.Size], pattern: str, names: ModelNames) -> Tensor:
        converter, begin = names.converter(pattern), 0
        for part, shape in zip(self.parts, shapes, strict=True):
            end = begin + shape[:-1].numel()
            converter.add_tensor(self.name, part.name, part.pattern, torch.arange(begin, end).view(*shape[:-1], 1))
            begin = end
        result: Tensor = converter.convert(self.name, model=names.model, config=names.config)[self.name]
        return result

    def _check_all_experts(self, source: StoredModel, names: ModelNames) -> None:
        pattern = self.parts[0].pattern
        if pattern is None:
            return
        count = names.parameters[self.name].shape[0]
        for each in names.converter(pattern).source_patterns:
            present = {part.name for part in self.parts if part.pattern == each}
            if "*" not in each or not present:
                continue
            first = re.fullmatch(r"(.*\.)\d+(\..*)", min(present))
            if first is None:
                continue
            missing = [n for n in (f"{first[1]}{e}{first[2]}" for e in range(count)) if n not in present]
            if missing:
                how = "are there" if self.parts[0].weight is None else "are quantised"
                raise ValueError(f"{source.folder} lacks {listed(missing)}; other experts of the layer {how}")

    def _check_alike(self, kinds: Sequence[str], source: StoredModel) -> None:
        """ValueError: an expert's weight is of another kind than those of most."""
        for pattern in {part.pattern for part in self.parts}:
            same = [(p, kind) for p, kind in zip(self.parts, kinds, strict=True) if p.pattern == pattern]
            usual, _ = Counter(kind for _, kind in same).most_common(1)[0]
            for part, kind in same:
                if kind != usual:
                    where = source.shards.file(part.weight or part.name)
                    raise ValueError(f"{where}: {part.name} is {kind}; that of other experts is {usual}")

    def _wrong(self, source: StoredModel, shape: list[int], wanted: torch.Size) -> str:
        return f"{self._where(source)} gives {self.name} {shape}; it must be {list(wanted)}"

    def _where(self, source: StoredModel) -> str:
        part = self.parts[0]
        return f"{source.shards.file(part.weight or part.name)}: {part.name}"


class _ExpertReader:
    """Reads the weight of one expert, rows that may lie in several tensors."""

    def __init__(
        self, shards: Shards, tensors: list[str], rows_EN: Tensor, columns: int, dtype: torch.dtype, transposed: bool
    ) -> None:
        """rows_EN: of all tensors together, which to read. transposed: what is stored is [in, out]."""
        self._shards, self._tensors, self._rows_EN = shards, tensors, rows_EN
        self._columns, self._dtype, self._transposed = columns, dtype, transposed
        self._ends = list(itertools.accumulate(shards.shape(name)[:-1].numel() for name in tensors))
        self._own = threading.local()

    def __call__(self, expert: int) -> Tensor:
        """Return the weight, [out, in]; the thread's next call overwrites it."""
        rows_N = self._rows_EN[expert]
        if "weight" not in vars(self._own):
            self._own.weight = torch.empty(len(rows_N), self._columns, dtype=self._dtype)
        result: Tensor = self._own.weight
        done = 0
        for tensor, first, count in self._runs(rows_N):
            self._read(result[done : done + count], tensor, first)
            done += count
        return result.mT if self._transposed else result

    def _runs(self, rows_N: Tensor) -> list[tuple[int, int, int]]:
        """Return (tensor, its first row, number) of rows that lie together."""
        ends = torch.tensor(self._ends)
        tensors_N = torch.searchsorted(ends, rows_N, right=True)
        apart = (rows_N.diff() != 1) | (tensors_N.diff() != 0)
        begins = [0, *(apart.nonzero().flatten() + 1).tolist()]
        runs = []
        for begin, end in itertools.pairwise([*begins, len(rows_N)]):
            tensor = int(tensors_N[begin])
            runs.append((tensor, int(rows_N[begin]) - (self._ends[tensor - 1] if tensor else 0), end - begin))
        return runs

    def _read(self, target: Tensor, tensor: int, first_row: int) -> None:
        name = self._tensors[tensor]
        stored = self._shards.dtype(name)
        read = target if stored == target.dtype else torch.empty(target.shape, dtype=stored)
        self._shards.read_into(read, name, first_row * self._columns)
        if read is not target:
            target.copy_(read)


def listed(names: Sequence[str]) -> str:
    """Return some of the names, as for an error."""
    others = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + others


def _places(rows_EN: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return where the rows of each part go, counted over all experts."""
    places = torch.empty(rows_EN.numel(), dtype=torch.int64)
    places[rows_EN.flatten()] = torch.arange(rows_EN.numel())
    return list(torch.split(places, [shape[:-1].numel() for shape in shapes]))
