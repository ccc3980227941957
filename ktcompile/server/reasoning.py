"""What a model thinks, told apart from what it says, while it comes: <think> ... </think> before the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ktcompile.server.tags import overlap

OPEN, CLOSE = "<think>", "</think>"
# auto: as qwen3 where the model's tokenizer or template has the tags, else none. deepseek_r1: an answer begins in
# thought, whether it has the first tag or not. qwen3: where it begins with that tag, or its prompt ends with it.
PARSERS = ("auto", "none", "deepseek_r1", "qwen3")
Kind = Literal["reasoning_content", "content"]


class ReasoningParser:
    """Tells thought from content. inside: the answer begins in thought. Blanks around a thought are dropped."""

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._begun = False  # whether what comes is no first tag
        self._strips = inside  # whether blanks that come are dropped
        self._held = ""  # what may become a tag, or blanks that may be the last of a thought

    @property
    def inside(self) -> bool:
        """Whether what comes is thought, as far as is known."""
        return self._inside

    def add(self, text: str) -> Iterator[tuple[Kind, str]]:
        """Yield what some more text is."""
        self._held += text
        if not self._begun:
            begin = self._held.lstrip()
            if OPEN.startswith(begin) and begin != OPEN:
                return
            self._begun = True
            if begin.startswith(OPEN):
                self._inside = self._strips = True
                self._held = begin[len(OPEN) :]
        if self._inside:
            place = self._held.find(CLOSE)
            sure = place if place >= 0 else len(self._held) - overlap(self._held, CLOSE)
            thought = self._held[:sure].rstrip()
            self._held = self._held[place + len(CLOSE) if place >= 0 else len(thought) :]
            yield from self._piece("reasoning_content", thought)
            if place < 0:
                return
            self._inside, self._strips = False, True
        said, self._held = self._held, ""
        yield from self._piece("content", said)

    def end(self) -> Iterator[tuple[Kind, str]]:
        """Yield what was held back."""
        held, self._held = self._held, ""
        if self._inside:
            yield from self._piece("reasoning_content", held.rstrip())
        else:
            yield from self._piece("content", held)

    def _piece(self, kind: Kind, text: str) -> Iterator[tuple[Kind, str]]:
        if self._strips:
            text = text.lstrip()
        if text:
            self._strips = False
            yield kind, text


def parser_for(choice: str, prompt: str, *, has_tags: bool) -> ReasoningParser | None:
    """Return what reads an answer, None where all of it is content.

    choice: of `PARSERS`. prompt: what the model's template made. has_tags: whether the model knows the tags.
    """
    if choice == "none" or (choice == "auto" and not has_tags):
        return None
    return ReasoningParser(inside=choice == "deepseek_r1" or prompt.rstrip().endswith(OPEN))
