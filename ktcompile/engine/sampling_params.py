"""What a request may say about the choice of its tokens. Names and meanings are those of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

_FORMS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class Thought:
    """What may come before that which a grammar is of: text between two tags. begun: the answer begins in it.

    Where it has not begun, `begin` must be a token, and the first: of other answers the grammar is of all.
    """

    begin: str
    end: str
    begun: bool


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What an answer must look like; exactly one of these, and perhaps `thought`, which comes before it.

    json: a JSON schema, as text or as what JSON makes of it. regex: a regular expression for all of it. choice: texts
    of which it is one. grammar: in Lark's notation as llguidance reads it, or GBNF. json_object: any JSON object.

    ValueError: none or several are given, or choice has no text.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    thought: Thought | None = None

    def __post_init__(self) -> None:
        given = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"structured_outputs has {', '.join(given) or 'nothing'}; give one of {_FORMS}")
        if self.choice is not None and not (self.choice and all(self.choice)):
            raise ValueError(f"choice of structured_outputs is {list(self.choice)}; give texts that are not empty")

    @property
    def kind(self) -> str:
        """Which one is given."""
        return next(name for name in _FORMS if getattr(self, name) not in (None, False))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and where it ends.

    max_tokens: at most so many; None: as many as the model has positions for. temperature: 0 takes the likeliest
    token. top_p: only the likeliest tokens that together have this probability are drawn from. seed: None draws a new
    one. stop: texts before which the answer ends; they are no part of it unless include_stop_str_in_output.

    top_k: only so many of the likeliest tokens are drawn from; 0 or -1: all. min_p: only tokens that have this part
    of the likeliest one's probability. repetition_penalty: logits of tokens of prompt and answer are divided by it
    where they are positive, multiplied where not. frequency_penalty: is taken from a token's logit each time that the
    answer has it; presence_penalty: once. logit_bias: is added to the logits of tokens.

    stop_token_ids: tokens that end the answer beside the model's own. min_tokens: before it has so many nothing ends
    it. ignore_eos: the model's end tokens do not end it. n: answers to give; the i-th draws from a stream i of the
    seed. logprobs: give with each token its log-probability and those of so many likeliest ones, before all of the
    above was applied; -1: of all. prompt_logprobs: the same of the prompt's tokens. skip_special_tokens: they have no
    text. structured_outputs: a grammar that the answer follows, behind its thought; it ends where the grammar does.

    ValueError: a value is out of its range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            self._require("max_tokens", self.max_tokens >= 1, "1 or more, or None")
        self._require("temperature", 0 <= self.temperature < float("inf"), "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("top_k", self.top_k >= -1, "1 or more; 0 or -1 for all tokens")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, -2 <= getattr(self, name) <= 2, "between -2 and 2; 0 changes nothing")
        self._require("min_tokens", self.min_tokens >= 0, "0 or more")
        if self.max_tokens is not None:
            self._require("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens, {self.max_tokens}")
        self._require("n", self.n >= 1, "1 or more")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            self._require(name, number is None or number >= -1, "0 or more, -1 for all tokens, or None")
        if self.seed is not None:
            self._require("seed", -(1 << 63) <= self.seed < 1 << 64, "an integer of 64 bits, or None")
        if not all(self.stop_texts):
            raise ValueError(f"stop is {self.stop!r}; an empty text would end every answer")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids is {list(self.stop_token_ids)}; tokens are numbered from 0 on")
        for token, bias in (self.logit_bias or {}).items():
            if token < 0 or not isfinite(bias):
                raise ValueError(f"logit_bias has {bias} for token {token}; it must be finite, of a token from 0 on")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check_vocabulary(self, size: int) -> None:
        """ValueError: logit_bias names a token that a model of `size` tokens lacks."""
        wrong = [token for token in self.logit_bias or () if token >= size]
        if wrong:
            raise ValueError(f"logit_bias has token {wrong[0]}; the model's tokens are 0 to {size - 1}")

    def _require(self, name: str, fulfilled: bool, wanted: str) -> None:
        if not fulfilled:
            raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")
