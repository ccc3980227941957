"""What the keys of an engine's blocks of keys and values are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
import transformers

import ktcompile
from ktcompile import _native
from ktcompile.cache.key import Namespace
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.summary import ModelSummary, text
from ktcompile.kv.layout import LayerKV
from ktcompile.machine import machine
from ktcompile.models.load import folder_of
from ktcompile.models.packed_cache import file_facts

# Goes up when kernels give other bits for the same tokens.
_NUMERICS = 2


def namespace_of(
    summary: ModelSummary,
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
    arithmetic = {
        "version": _NUMERICS,
        "releases": [ktcompile.__version__, torch.__version__, transformers.__version__],
        "layout": _native.LAYOUT_VERSION,
        "isa": machine().isa,
        "dtype": summary.dtype,
        "formats": [options.weight_format, options.dense_format, options.head_format],
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
        attention=summary.config,
        numerics=text(arithmetic),
    )


def weights_of(name: str, options: EngineOptions) -> str | None:
    """Return what identifies the weights of a model that `ktcompile.models.load.locate` named: a digest of its
    configuration and of the names, sizes, times and headers of its files, wherever these are. None: nothing outlives
    the engine, or the weights are of another kind."""
    if options.kv_disk_path is None:
        return None
    folder = folder_of(name)
    files = file_facts(folder)
    if not files:
        return None
    return hashlib.sha256(text([files, (folder / "config.json").read_text()]).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of what a tokenizer is; of one that is none of transformers' the name of its class."""
    kind = type(tokenizer)
    if isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        digested = tokenizer.backend_tokenizer.to_str()
    elif isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        digested = text(tokenizer.get_vocab())
    else:
        digested = f"{kind.__module__}.{kind.__qualname__}"
    return hashlib.sha256(digested.encode()).hexdigest()
