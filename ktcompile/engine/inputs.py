"""What a step of the scheduler is as tensors.

Shape suffixes: T tokens of a step, B sequences at most, W blocks of a sequence at most.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ktcompile.scheduler.batch import Chunk, Step


class StepTensors(NamedTuple):
    """The inputs whose number changes from step to step, each of its own memory.

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
        self._written: list[tuple[int, ...]] = [()] * max_num_seqs
        self.block_table = torch.from_numpy(self._table_BW)
        self.lengths = torch.from_numpy(self._lengths)
        self.query_starts = torch.from_numpy(self._starts)

    def make(self, step: Step) -> StepTensors:
        """Return the tensors of a step, those of its sequences being written.

        Shapes are those of two graphs: of one token with its logits, and of two tokens and rows or more. Rows that
        nobody asked for are behind all others, and the same as the last.
        """
        chunks = step.chunks
        ids: list[int] = []
        rows: list[int] = []
        places = [0]
        for i, chunk in enumerate(chunks):
            rows += range(len(ids) + chunk.logits_from - chunk.begin, len(ids) + len(chunk.token_ids))
            places.append(len(rows))
            ids += chunk.token_ids
            self._starts[i + 1] = len(ids)
            self._lengths[i] = chunk.end
            if self._written[i] != chunk.block_table:
                self._table_BW[i, : len(chunk.block_table)] = chunk.block_table
                self._written[i] = chunk.block_table
        self._starts[len(chunks) + 1 :] = len(ids)
        self._lengths[len(chunks) :] = 0
        positions, slots = self._places(chunks)
        least = min(2, len(ids))
        rows += rows[-1:] * (least - len(rows)) if rows else [len(ids) - 1] * least
        token_ids = torch.tensor(ids)
        return StepTensors(
            token_ids[None], torch.from_numpy(positions)[None], torch.from_numpy(slots), torch.tensor(rows), places
        )

    def _places(self, chunks: tuple[Chunk, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the position and the slot of each token."""
        positions = np.concatenate([np.arange(chunk.begin, chunk.end) for chunk in chunks])
        sequences = np.repeat(np.arange(len(chunks)), [len(chunk.token_ids) for chunk in chunks])
        blocks = self._table_BW[sequences, positions // self._block_size].astype(np.int64)
        return positions, blocks * self._block_size + positions % self._block_size
