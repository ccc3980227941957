"""Whether the tensors of a checkpoint are those that its configuration asks for, by their headers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ktcompile.models.source import ModelSource, StoredTensor
from ktcompile.quant import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def differences(source: ModelSource, model: PreTrainedModel, stored_format: str) -> list[str]:
    """Return a sentence if the checkpoint has other parameters than `model`, by their number of elements.

    Names do not serve: checkpoints have experts one by one, models all in one. What transformers leaves out on
    purpose is left out here. Elements of quantised checkpoints are not counted.
    """
    if source.tensors is None:
        return []
    if FORMATS[stored_format].storage is None:
        return ["the checkpoint is quantised: its headers were not compared with the configuration"]
    stored = sum(t.elements for t in source.tensors if not _is_left_out(t, model))
    wanted = sum(p.numel() for p in model.parameters()) + _saved_buffers(model)
    if stored == wanted:
        return []
    more = "more" if stored > wanted else "fewer"
    return [
        f"the checkpoint has {abs(stored - wanted):,} elements {more} than its configuration asks for "
        f"({stored:,}, not {wanted:,}): figures are those of the configuration"
    ]


def _is_left_out(tensor: StoredTensor, model: PreTrainedModel) -> bool:
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    if any(re.search(pattern, tensor.name) for pattern in patterns):
        return True
    # A shared parameter that is stored under both of its names.
    own = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own
    return tensor.name in shared


def _saved_buffers(model: PreTrainedModel) -> int:
    saved = model.state_dict()
    return sum(buffer.numel() for name, buffer in model.named_buffers() if name in saved)
