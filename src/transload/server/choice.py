"""One choice of a call: its tokens become text, up to a stop string, with log-probabilities beside it.

Text after a stop string never leaves. Sends nothing and knows no API.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from transload.control.messages import FinishReason, Token
from transload.model.detokenizer import Detokenizer, StopFinder
from transload.runtime.base import Finished
from transload.server.parameters import Parameters
from transload.server.replies import TokenEntry
from transload.server.tokens import Tokenizer

if TYPE_CHECKING:
    from transload.model.tokenizer import ModelTokenizer


class Choice:
    """Grows by `push`; what may leave by now is handed over by `take`."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, parameters: Parameters, *, counts_prompt: bool, continues: bool
    ) -> None:
        """`counts_prompt`: this choice stands for its prompt in the usage (one of n does). `continues`: the text goes
        on where the prompt ends (a completion), so that a space at its start is kept."""
        self.index = index
        self.counts_prompt = counts_prompt
        self.opened = False
        self.stopped = False
        """A stop string was found: the text is complete."""
        self.reason: FinishReason | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.first_token_at = 0.0
        self._detokenizer = Detokenizer(
            cast("ModelTokenizer", tokenizer),  # it reads token_table alone
            skip_special=parameters.skip_special,
            continues=continues,
        )
        self._finder = StopFinder(parameters.stops, include_stop=parameters.include_stop) if parameters.stops else None
        self._include_stop = parameters.include_stop
        self._min_tokens = parameters.sampling.min_tokens
        self._parts: list[str] = []  # text that may leave, and has not yet
        self._num_released = 0  # characters that may leave, in all
        self._num_made = 0  # characters detokenized, in all; more than released while a stop string may be beginning
        self._entries: list[TokenEntry] = []

    def push(self, tokens: Sequence[Token]) -> None:
        """Take the tokens of a step. Stops at the one that completes a stop string; later ones do not count."""
        for token in tokens:
            self.num_tokens += 1
            if token.finish == "stop" and not self._include_stop:
                return  # the token that stops is no part of the text
            text = self._detokenizer.push(token.token)
            if token.logprobs is not None:
                self._entries.append(TokenEntry(token.token, self._num_made, token.logprobs))
            if text:
                self._add(text)
                if self.stopped:
                    return

    def end(self, finished: Finished) -> None:
        """No more tokens come: release what was held back."""
        self.num_cached_tokens = finished.num_cached_tokens
        if self.stopped:
            self.reason = "stop"  # whatever else happened after the text was complete
            return
        self.reason = finished.reason
        rest = self._detokenizer.flush()
        if rest:
            self._add(rest)
        if self._finder is not None and not self.stopped:
            self._release(self._finder.flush())
        if self.stopped and self.reason == "length":
            self.reason = "stop"

    def has_news(self) -> bool:
        """Whether `take` would give anything."""
        return bool(self._parts) or (bool(self._entries) and self._num_ready_entries() > 0)

    def take(self) -> tuple[str, list[TokenEntry]]:
        """The text, and the tokens it begins in, since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        if not self._entries:
            return text, []
        num_ready = self._num_ready_entries()
        ready, self._entries = self._entries[:num_ready], self._entries[num_ready:]
        return text, ready

    def _add(self, text: str) -> None:
        self._num_made += len(text)
        finder = self._finder
        if finder is None or self.num_tokens <= self._min_tokens:
            self._release(text)
            return
        self._release(finder.feed(text))
        self.stopped = finder.found is not None

    def _release(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._num_released += len(text)

    def _num_ready_entries(self) -> int:
        """Tokens whose text has begun to leave: log-probabilities are no way around a stop string."""
        if self._finder is None or (self.reason is not None and not self.stopped):
            return len(self._entries)
        return sum(entry.start < self._num_released for entry in self._entries)
