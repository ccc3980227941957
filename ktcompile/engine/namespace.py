"""What the keys of an engine's blocks of keys and values are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
import transformers

import ktcompile
from ktcompile import _native
from ktcompile.cache.key import Namespace
from ktcompile.engine.options import EngineOptions
from ktcompile.kv.layout import LayerKV
from ktcompile.machine import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Goes up when kernels give other bits for the same tokens.
_NUMERICS = 1
# Of a model's configuration: where it came from.
_NOT_OF_NUMBERS = ("_name_or_path", "transformers_version")


def namespace_of(
    model: PreTrainedModel,
    tokenizer: Any,
    options: EngineOptions,
    kv_format: str,
    layers: Sequence[LayerKV],
    weights: str,
    adapter: str = "",
) -> Namespace:
    """Return the namespace of a model's blocks. weights, adapter: digests of their contents.

    All of the configuration counts as how attention computes: what of it does not is the same wherever weights are.
    """
    config = {k: v for k, v in model.config.get_text_config().to_dict().items() if k not in _NOT_OF_NUMBERS}
    arithmetic = {
        "version": _NUMERICS,
        "releases": [ktcompile.__version__, torch.__version__, transformers.__version__],
        "layout": _native.LAYOUT_VERSION,
        "isa": machine().isa,
        "dtype": str(model.dtype),
        "formats": [options.weight_format, options.dense_format],
        "eager": options.eager,
        "device": options.device,
    }
    return Namespace(
        weights=weights,
        tokenizer=_tokenizer_digest(tokenizer),
        adapter=adapter,
        kv_format=kv_format,
        layout=json.dumps([astuple(layer) for layer in layers]),
        block_size=options.block_size,
        attention=_text(config),
        numerics=_text(arithmetic),
    )


def _text(facts: object) -> str:
    return json.dumps(facts, sort_keys=True, default=str)


def _tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of what a tokenizer is; of one that is none of transformers' the name of its class."""
    kind = type(tokenizer)
    if isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        text = tokenizer.backend_tokenizer.to_str()
    elif isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        text = _text(tokenizer.get_vocab())
    else:
        text = f"{kind.__module__}.{kind.__qualname__}"
    return hashlib.sha256(text.encode()).hexdigest()
