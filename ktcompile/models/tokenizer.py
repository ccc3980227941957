"""The tokenizer of a model."""

from __future__ import annotations

from typing import Any

from ktcompile import collector


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model. FileNotFoundError: its files cannot be found or read."""
    try:
        with collector.paused():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"cannot load the model {name}: {error}") from error


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text. ValueError: the tokenizer knows none."""
    ids: list[int] = tokenizer(text)["input_ids"]
    if text and not ids:  # transformers makes an empty tokenizer where it finds no files
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} knows no tokens; are files such as tokenizer.json missing?"
        )
    return ids
