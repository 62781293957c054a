"""What a step works on, as the cost model sees it. Owns shapes; knows no chip and no model."""

from __future__ import annotations

import msgspec


class StepShape(msgspec.Struct, frozen=True):
    """The work of one step of one worker."""

    prefill: tuple[tuple[int, int], ...] = ()
    """(start, num_tokens) of each prefill chunk: `num_tokens` new tokens after `start` that are in the cache."""
    num_decode: int = 0
    """Requests that get one token each."""
    decode_context_tokens: int = 0
    """Context of the decoding requests, summed, the new token included."""

    @property
    def num_prefill_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.prefill)

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decode
