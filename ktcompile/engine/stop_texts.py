"""Texts that end an answer, found while it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes on text that cannot become a part of a stop text, and finds the first that is complete.

    Where several are complete at the same character the longest counts. How the text is cut into pieces changes
    nothing. Each character costs a few steps for each stop text (Knuth, Morris and Pratt 1977), however long these are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Matcher(stop) for stop in stops]
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """Return the text that is sure now, and the stop text if one is complete; nothing is held back then.

        The text ends where the stop text begins. What follows it is dropped, and nothing may be added any more.
        """
        if not self._stops:
            return piece, None
        text, begin = self._held + piece, len(self._held)
        for end, character in enumerate(piece, begin + 1):
            complete = [matcher.text for matcher in self._stops if matcher.step(character)]
            if complete:
                stop = max(complete, key=len)
                return text[: end - len(stop)], stop
        sure = len(text) - max(matcher.matched for matcher in self._stops)
        self._held = text[sure:]
        return text[:sure], None

    def end(self) -> str:
        """Return what was held back, since no more text comes."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knows how many characters of `text` the characters so far end with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # Of the first n characters, how many of their last are also their first, all n apart.
        self._shorter = [0, 0]
        for character in text[1:]:
            self._shorter.append(self._next(self._shorter[-1], character))

    def step(self, character: str) -> bool:
        """Return whether the text is complete with `character`. No step may follow one that is."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.text)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)
