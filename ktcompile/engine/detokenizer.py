"""Text from tokens as they come."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

# What a tokenizer gives for bytes that are no UTF-8, such as the first half of a character.
_REPLACEMENT = "\ufffd"
# Tokens of a prompt that are decoded once more with the first new ones.
_CONTEXT = 32
# Tokens that are decoded with each new one, before the oldest are left out.
_LONGEST = 8


class Decoder(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...

    def __hash__(self) -> int: ...


class IncrementalText:
    """Gives the text of each new token once its characters are complete.

    The pieces that `add` returns make up the text that follows the prompt, as decoding everything at once gives
    it. Bytes at the end that are no whole character are held back, and dropped if the end comes.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._decode = _plain(tokenizer, skip_special_tokens)
        self._texts = _texts(tokenizer, skip_special_tokens)
        # The text of [0, _read) is _given. A tokenizer may drop the space before its first token, so decoding begins
        # one piece before what is new, that at _piece; a piece begins where a character does. The end of a prompt is
        # enough: what a cut through a character gives is the same with and without the new text.
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._piece, self._read = 0, len(self._ids)
        self._given = self._decode(self._ids)

    def add(self, token: int) -> str:
        """Return the text that `token` completes; it may be empty."""
        if self._texts is not None and self._read == len(self._ids) and not self._given.endswith(_REPLACEMENT):
            known = self._texts.get(token)
            if known is None:
                known = self._texts[token] = self._decode([token])
            if not known:
                return ""
            if _REPLACEMENT not in known:
                self._ids, self._piece, self._read, self._given = [token], 0, 1, known
                return known
        self._ids.append(token)
        text = self._decode(self._ids)
        new = text[len(self._given) :]
        if not new:
            if not self._decode([token]):  # it has no text anywhere
                self._ids.pop()
            return ""
        if new.endswith(_REPLACEMENT):
            return ""
        self._piece, self._read, self._given = self._read, len(self._ids), text
        if self._read > _LONGEST:
            self._ids = self._ids[self._piece :]
            self._piece, self._read, self._given = 0, len(self._ids), self._decode(self._ids)
        return new

    def end(self) -> str:
        """Return what was held back, without an incomplete character at its end."""
        text = self._decode(self._ids)
        new, self._given = text[len(self._given) :], text
        return new.rstrip(_REPLACEMENT)


def decode(tokenizer: Decoder, token_ids: list[int], *, skip_special_tokens: bool) -> str:
    """Return the text of tokens, spaces as they are."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


@functools.lru_cache(maxsize=4)
def _texts(tokenizer: Any, skip_special_tokens: bool) -> dict[int, str] | None:
    """Return texts of tokens by themselves, which `IncrementalText` adds to; None: text is not made of these.

    It is where a tokenizer decodes the bytes of its tokens one behind the other: then a whole character's text depends
    on no other. To look it up takes a tenth of decoding it once more.
    """
    from tokenizers import decoders

    backend = _backend(tokenizer)
    return {} if backend is not None and isinstance(backend.decoder, decoders.ByteLevel) else None


def _plain(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """Return `decode` of a tokenizer, or that of its tokenizers.Tokenizer: 1.5 us a call in place of 7."""
    backend = _backend(tokenizer)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens)
    return lambda ids: decode(tokenizer, ids, skip_special_tokens=skip_special_tokens)


def _backend(tokenizer: Any) -> Any:
    """Return the tokenizers.Tokenizer of a tokenizer whose `decode` is nothing but that one's; else None."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    fast = PreTrainedTokenizerFast
    if isinstance(tokenizer, fast) and (kind.decode, kind._decode) == (fast.decode, fast._decode):
        return tokenizer.backend_tokenizer
    return None
