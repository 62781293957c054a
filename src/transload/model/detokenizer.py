"""Tokens to text as they come, and stop strings in that text. Never emits half a character or part of a stop string.

Both cost a bounded number of operations for each byte, however long the text has become.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from transload.errors import RequestError
from transload.model.tokenizer import ModelTokenizer


class Detokenizer:
    """One text. All that `push` returns, then `flush`, is what `ModelTokenizer.decode` gives for all tokens at once."""

    def __init__(self, tokenizer: ModelTokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        """`continues`: the text goes on after a prompt, so that a space at its start is kept."""
        self._tokens = tokenizer.token_table
        self._skipped = self._tokens.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips = self._tokens.strips_first_space and not continues

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        return self._stripped(self._decoder.decode(self._tokens[token_id]))

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that was never completed."""
        text = self._stripped(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        return text

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class StopFinder:
    """Looks for stop strings across the borders of what it is fed.

    The text ends at the stop string that is complete first; of several that end at one place, at the longest.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """Raises `RequestError` if a stop string is empty: it would be found at once."""
        if any(not stop for stop in stops):
            raise RequestError("stop holds an empty string, wanted at least one character in each", param="stop")
        self._patterns = [_Pattern(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Text that may be shown now; the rest is held while it may be the start of a stop string.

        After a stop string is found nothing more is shown.
        """
        if self.found is not None:
            return ""
        if not self._patterns:
            return text
        seen = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            complete = [pattern.stop for pattern in self._patterns if pattern.step(character)]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                return seen[: position if self._include_stop else position - len(self.found)]
        # What belongs to the text in any case need not wait.
        shown = len(seen) if self._include_stop else len(seen) - max(pattern.matched for pattern in self._patterns)
        self._held = seen[shown:]
        return seen[:shown]

    def flush(self) -> str:
        """What was held when the text ended without a stop string."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """One stop string: after each character, how much of its start the text ends with (Knuth, Morris, Pratt)."""

    __slots__ = ("_fallback", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = [0]
        length = 0
        for character in stop[1:]:
            while length and stop[length] != character:
                length = self._fallback[length - 1]
            length += stop[length] == character
            self._fallback.append(length)

    def step(self, character: str) -> bool:
        """Take one character; true if it completes the stop string."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.stop[self.matched] == character
        return self.matched == len(self.stop)
