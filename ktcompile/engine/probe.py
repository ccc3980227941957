"""Whether a model can run over blocks, and what its layers keep there: it is found by running it on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ktcompile.models import hf_paged
from ktcompile.models.hf_paged import AttentionCall, Probe
from ktcompile.models.latents import LatentSizes, keeping_latents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 3
_KINDS = ("full_attention", "sliding_attention")
# Of these the angles of all tokens depend on the largest position of the step.
_CHANGING_ROPE = ("dynamic", "longrope")


class UnsupportedModelError(ValueError):
    """A model that the engine cannot run."""


def attention_calls(model: PreTrainedModel, latents: Mapping[Any, LatentSizes] | None = None) -> list[AttentionCall]:
    """Return what each layer of a model asks of attention, by the number of the layer. latents: modules that keep such.

    UnsupportedModelError: the model keeps something else of a sequence, or its attention is of another kind.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    fields: dict[str, Any] = config.to_dict()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name} takes no position_ids, so tokens of several sequences cannot be told apart"
        )
    if model.device.type != "cpu":
        raise UnsupportedModelError(f"{name} is on {model.device}; keys and values in blocks are on the CPU alone")
    _check_rope(name, fields)
    probe = Probe(latents)
    ids = torch.arange(1, 1 + _TOKENS)[None] % fields["vocab_size"]
    with paged_implementation(model, probe.latents), torch.no_grad():
        try:
            model(input_ids=ids, position_ids=torch.arange(_TOKENS)[None], use_cache=False, kv_step=probe)
        except (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise UnsupportedModelError(f'{name} cannot run attention "{hf_paged.NAME}": {error}') from error
    calls = sorted(probe.calls, key=lambda call: call.layer)
    layers = list(range(config.num_hidden_layers))
    if [call.layer for call in calls] != layers:
        found = f"layers {[call.layer for call in calls]} of {len(layers)} call attention once"
        raise UnsupportedModelError(f"{name} keeps more than keys and values of its attention: {found}")
    for call in calls:
        if call.reason:
            raise UnsupportedModelError(f"{name} cannot run over blocks: in layer {call.layer} {call.reason}")
    _check_windows(name, fields, calls)
    return calls


@contextmanager
def paged_implementation(model: PreTrainedModel, latents: Mapping[Any, LatentSizes]) -> Iterator[None]:
    """Have a model run attention over blocks for a while. latents: modules that keep such."""
    before = model.config._attn_implementation
    model.set_attn_implementation(hf_paged.NAME)
    try:
        with keeping_latents(latents):
            yield
    finally:
        model.set_attn_implementation(before)


def _check_rope(name: str, fields: dict[str, Any]) -> None:
    rope = fields.get("rope_parameters") or {}
    kinds = {str(p.get("rope_type")) for p in (rope, *rope.values()) if isinstance(p, dict)}
    changing = kinds.intersection(_CHANGING_ROPE)
    if changing:
        raise UnsupportedModelError(
            f"{name} has rotary embeddings of type {', '.join(sorted(changing))}, whose angles depend on the longest "
            "sequence of a step"
        )


def _check_windows(name: str, fields: dict[str, Any], calls: list[AttentionCall]) -> None:
    """Windows are elsewhere in masks, which are not made here: attention must be told of each."""
    window = fields.get("sliding_window")
    kinds = fields.get("layer_types") or ["sliding_attention" if window else "full_attention"] * len(calls)
    for call, kind in zip(calls, kinds, strict=True):
        if kind not in _KINDS:
            raise UnsupportedModelError(f"{name} has layers of {kind}; the engine has {' and '.join(_KINDS)}")
        wanted = window if kind == "sliding_attention" else None
        if call.window != wanted:
            raise UnsupportedModelError(
                f"{name} has {kind} in layer {call.layer} with a window of {wanted}, and tells attention {call.window}"
            )
