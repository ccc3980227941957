"""Answers that follow a grammar: which tokens may come next.

The grammar engine is llguidance (extra `serve`). The trie of a tokenizer is made once, a grammar when it first comes;
each answer has a copy of its own.
"""

from __future__ import annotations

import functools
import importlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktcompile.engine.detokenizer import IncrementalText

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ktcompile.engine.sampling_params import StructuredOutputsParams

# Between the parts of JSON: nothing, a space, or a line with its indentation. A model at a loss would go on with blanks
# until its tokens end.
_JSON = {"whitespace_pattern": r"( |\n[ ]{0,32})?"}


class Grammar:
    """Where an answer is in its grammar. It is over the tokens of one answer, and shares nothing that changes.

    ValueError: the grammar cannot be used, or llguidance is not there.
    """

    def __init__(self, params: StructuredOutputsParams, tokenizer: Any) -> None:
        self._matcher = _compiled(tokenizer, _source(_llguidance(), params)).deep_copy()
        self._check(params.kind)
        self._opening: int | None = None  # the token that would begin a thought
        self._closing: _Closing | None = None  # while it is thought
        if params.thought is not None:
            self._closing = _Closing(tokenizer, params.thought.end)
            if not params.thought.begun:
                self._opening, self._later = tokenizer.get_added_vocab().get(params.thought.begin), self._closing
                self._closing = None

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but an end."""
        return self._matcher.is_stopped()

    def allowed(self, size: int) -> NDArray[np.bool_] | None:
        """Return which of the model's first `size` tokens may come next; None: all."""
        if self._closing is not None:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check("grammar")
        known = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        known = known if len(known) == size else np.pad(known, (0, size - len(known)))
        if self._opening is not None:
            known[self._opening] = True
        return known

    def add(self, token: int) -> None:
        """Note the next token of the answer. ValueError: it does not follow the grammar."""
        opening, self._opening = self._opening, None  # a thought comes first
        if self._closing is not None:
            if self._closing.add(token):
                self._closing = None
        elif token == opening:
            self._closing = self._later
        elif not self._matcher.consume_token(token):
            self._check("grammar")

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise ValueError(f"{what} of structured_outputs cannot be used: {self._matcher.get_error()}")


class _Closing:
    """Waits for the tag that ends a thought, whether it is one token or several; what its last one has behind the tag
    is of no grammar."""

    def __init__(self, tokenizer: Any, tag: str) -> None:
        self._text = IncrementalText(tokenizer, (), skip_special_tokens=False)
        self._tag, self._last = tag, ""

    def add(self, token: int) -> bool:
        """Return whether the tag is complete with `token`."""
        text = self._last + self._text.add(token)
        self._last = text[max(0, len(text) - len(self._tag) + 1) :]
        return self._tag in text


def _source(guidance: Any, params: StructuredOutputsParams) -> str:
    """Return a grammar as llguidance reads it."""
    matcher = guidance.LLMatcher
    if params.json is not None:
        schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
        return str(matcher.grammar_from_json_schema(schema, overrides=_JSON))
    if params.json_object:
        return str(matcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON))
    if params.regex is not None:
        return str(matcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in params.choice)))
    assert params.grammar is not None
    return str(guidance.grammar_from("grammar", params.grammar))


@functools.lru_cache(maxsize=128)
def _compiled(tokenizer: Any, source: str) -> LLMatcher:
    """Return a grammar at its beginning, to be copied. A large one may take a second."""
    matcher: LLMatcher = _llguidance().LLMatcher(_trie(tokenizer), source, log_level=0)
    return matcher


@functools.lru_cache(maxsize=4)
def _trie(tokenizer: Any) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer)


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ValueError("structured_outputs needs llguidance: pip install 'ktcompile[serve]'") from error
