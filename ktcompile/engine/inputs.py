"""What a step of the scheduler is as tensors.

Shape suffixes: T tokens of a step, B sequences at most, W blocks of a sequence at most.
"""

from __future__ import annotations

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
    """Makes the tensors of steps.

    Those of sequences keep their size and are written to in place: lengths [B] and query_starts [B + 1], int64, and
    block_table [B, W], int32. Sequences behind those of a step have no queries.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._table_BW = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._lengths = np.zeros(max_num_seqs, dtype=np.int64)
        self._starts = np.zeros(max_num_seqs + 1, dtype=np.int64)
        self._written: list[tuple[int, ...]] = [()] * max_num_seqs  # tables of a request are one until it grows
        self.block_table = torch.from_numpy(self._table_BW)
        self.lengths = torch.from_numpy(self._lengths)
        self.query_starts = torch.from_numpy(self._starts)

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
        places, starts, ends = [0], [0], []
        for i, chunk in enumerate(step.chunks):
            before, begin, table = len(ids), chunk.begin, chunk.block_table
            end = begin + len(chunk.token_ids)
            ids += chunk.token_ids
            rows += range(before + chunk.logits_from - begin, len(ids))
            positions += range(begin, end)
            slots += [table[p // size] * size + p % size for p in range(begin, end)]
            places.append(len(rows))
            starts.append(len(ids))
            ends.append(end)
            if self._written[i] is not table:
                self._table_BW[i, : len(table)] = table
                self._written[i] = table
        count = len(ends)
        self._starts[: count + 1], self._starts[count + 1 :] = starts, len(ids)
        self._lengths[:count], self._lengths[count:] = ends, 0
        least = min(2, len(ids))
        rows += rows[-1:] * (least - len(rows)) if rows else [len(ids) - 1] * least
        of_tokens = torch.from_numpy(np.array((ids, positions, slots), dtype=np.int64))
        of_rows = torch.from_numpy(np.array(rows, dtype=np.int64))
        return StepTensors(of_tokens[0:1], of_tokens[1:2], of_tokens[2], of_rows, places)
