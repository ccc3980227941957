"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# What a tokenizer gives for bytes that are no UTF-8, such as the first half of a character.
_REPLACEMENT = "\ufffd"
# Tokens of a prompt that are decoded once more with the first new ones.
_CONTEXT = 32


class Decoder(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class IncrementalText:
    """Gives the text of each new token once its characters are complete.

    The pieces that `add` returns make up the text that follows the prompt, as decoding everything at once gives
    it. Bytes at the end that are no whole character are held back, and dropped if the end comes.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The text of [0, _read) was given already, that of [_read, len) was not. A tokenizer may drop the space
        # before its first token, so decoding begins one piece before; a piece begins where a character does. The end of
        # a prompt is enough: what a cut through a character gives is the same with and without the new text.
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._read = len(self._ids)

    def add(self, token: int) -> str:
        """Return the text that `token` completes; it may be empty."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text

    def end(self) -> str:
        """Return what was held back, without an incomplete character at its end."""
        text = self._new_text()
        self._read = len(self._ids)
        return text.rstrip(_REPLACEMENT)

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, skip_special_tokens=self._skip_special_tokens)


def decode(tokenizer: Decoder, token_ids: list[int], *, skip_special_tokens: bool) -> str:
    """Return the text of tokens, spaces as they are."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
