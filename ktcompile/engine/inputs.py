"""What a step of the scheduler is as tensors.

Shape suffixes: T tokens of a step, B sequences at most, W blocks of a sequence at most.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ktcompile.scheduler.batch import Step


class StepTensors(NamedTuple):
    """The inputs whose number changes from step to step.

    rows: of which tokens the logits are wanted. places: chunk i has the logits [places[i], places[i + 1]).
    """

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    slot_mapping: Tensor  # [T]
    rows: Tensor
    places: list[int]


class StepInputs:
    """Makes the tensors of steps. They are written to in place: those of one step are gone with the next.

    Those of sequences keep their size: lengths [B] and query_starts [B + 1], int64, and block_table [B, W], int32.
    Sequences behind those of a step have no queries. Those of tokens are made anew where their number changes.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self._block_size, self._max_num_seqs = block_size, max_num_seqs
        self._table_BW = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._written: list[tuple[int, ...]] = [()] * max_num_seqs  # tables of a request are one until it grows
        self.block_table = torch.from_numpy(self._table_BW)
        (self.lengths, self.query_starts), self._of_sequences = _numbers(max_num_seqs, max_num_seqs + 1)
        self._starts = [0]
        self._shape = (1, 1)
        self._tensors, self._of_tokens = _of_tokens(1, 1)

    def make(self, step: Step) -> StepTensors:
        """Return the tensors of a step, those of its sequences being written.

        Shapes are those of two graphs: of one token with its logits, and of two tokens and rows or more. Rows that
        nobody asked for are behind all others, and the same as the last.
        """
        size = self._block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        places, starts, lengths = [0], [0], []
        for i, chunk in enumerate(step.chunks):
            _, token_ids, begin, table, logits_from, _ = chunk
            before, end = len(ids), begin + len(token_ids)
            ids += token_ids
            if end - begin == 1:  # most are so
                positions.append(begin)
                slots.append(table[begin // size] * size + begin % size)
            else:
                positions += range(begin, end)
                slots += [table[p // size] * size + p % size for p in range(begin, end)]
            rows += range(before + logits_from - begin, len(ids))
            places.append(len(rows))
            starts.append(len(ids))
            lengths.append(end)
            if self._written[i] is not table:
                self._table_BW[i, : len(table)] = table
                self._written[i] = table
        tokens, rest = len(ids), self._max_num_seqs - len(lengths)
        least = min(2, tokens)
        rows += rows[-1:] * (least - len(rows)) if rows else [tokens - 1] * least
        if self._shape != (tokens, len(rows)):
            self._shape = tokens, len(rows)
            self._tensors, self._of_tokens = _of_tokens(tokens, len(rows))
        # Bytes that are copied are less work than arrays of numpy, and far less code in a processor whose caches the
        # model has just emptied.
        if self._starts != starts:
            self._starts = starts
            self._of_sequences[:] = array("q", lengths + [0] * rest + starts + [tokens] * rest).tobytes()
        else:
            self._of_sequences[: 8 * len(lengths)] = array("q", lengths).tobytes()
        self._of_tokens[:] = array("q", ids + positions + slots + rows).tobytes()
        return StepTensors(*self._tensors, places)


def _of_tokens(tokens: int, rows: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], memoryview]:
    """Return the tensors of `StepTensors`, and their bytes."""
    (ids, positions, slots, wanted), memory = _numbers(tokens, tokens, tokens, rows)
    return (ids[None], positions[None], slots, wanted), memory


def _numbers(*counts: int) -> tuple[list[Tensor], memoryview]:
    """Return int64 tensors of so many numbers, zeros, and the bytes of all of them, one behind the other."""
    whole = np.zeros(sum(counts), dtype=np.int64)
    return list(torch.from_numpy(whole).split_with_sizes(counts)), whole.data.cast("B")
