"""Whether the tensors of a checkpoint are those that its configuration asks for, by their headers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ktcompile.models.source import ModelSource
from ktcompile.models.tensor_files import StoredTensor
from ktcompile.quant import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALES = (
    *("weight_scale_inv", "weight_scale", "scale", "qzeros", "scales", "g_idx"),
    *("weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point", "activation_scale"),
)
_SUFFIXES_OF_SCALES = ("_proj_scales", "_proj_scale_inv", "_proj_activation_scale")


def differences(source: ModelSource, model: PreTrainedModel, stored_format: str) -> list[str]:
    """Return a sentence if the checkpoint has other parameters than `model`, by their number of elements.

    Names do not serve: checkpoints have experts one by one, models all in one. What transformers leaves out on
    purpose is left out here. Of quantised weights the codes are counted.
    """
    if source.tensors is None:
        return []
    quantized = FORMATS[stored_format].storage is None
    kept = [t for t in source.tensors if not _is_left_out(t, model)]
    stored = sum(_weights(t) if quantized else t.elements for t in kept)
    wanted = sum(p.numel() for p in model.parameters()) + _saved_buffers(model)
    if stored == wanted:
        return []
    more = "more" if stored > wanted else "fewer"
    return [
        f"the checkpoint has {abs(stored - wanted):,} elements {more} than its configuration asks for "
        f"({stored:,}, not {wanted:,}): figures are those of the configuration"
    ]


def _weights(tensor: StoredTensor) -> int:
    """Return how many weights a tensor of a quantised checkpoint stands for: none if it holds scales and the like."""
    if tensor.name.rpartition(".")[2] in _SCALES or tensor.name.endswith(_SUFFIXES_OF_SCALES):
        return 0
    if tensor.name.endswith((".qweight", ".weight_packed")):
        return tensor.elements * 8  # of four bits in 32
    if tensor.name.endswith("_blocks") or (tensor.dtype == "I8" and tensor.name.endswith(".weight")):
        return tensor.elements * 2
    return tensor.elements


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
