"""How often each token occurred in a request, for the penalties: counted as it grows, recounted when in doubt.

Owns the counts and their effect on logits. The truth is always the chunk's token list, so a request may move to another
worker, be preempted or come back, and the counts follow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from transload.control.messages import Chunk, RequestId, Sampling

_MAX_HISTORIES = 1024


def has_penalties(sampling: Sampling) -> bool:
    """Whether past tokens change this request's logits."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class TokenHistory:
    """The distinct tokens of one request and how often each came as output."""

    __slots__ = ("_counts", "_ids", "_last", "_num_counted", "_num_distinct", "_place")

    def __init__(self) -> None:
        self._ids = np.empty(256, dtype=np.int64)
        self._counts = np.zeros(256, dtype=np.float32)
        self._place: dict[int, int] = {}
        self._num_distinct = 0
        self._num_counted = 0
        self._last = -1

    def follows(self, tokens: Sequence[int], num_known: int) -> bool:
        """Whether what was counted is a beginning of these tokens, as far as a look at its end can tell."""
        counted = self._num_counted
        return counted <= num_known and (counted == 0 or tokens[counted - 1] == self._last)

    def extend(self, tokens: Sequence[int], num_known: int, num_prompt_tokens: int) -> None:
        """Count tokens up to `num_known`; those from `num_prompt_tokens` on are outputs."""
        for position in range(self._num_counted, num_known):
            token = tokens[position]
            place = self._place.get(token)
            if place is None:
                place = self._add(token)
            if position >= num_prompt_tokens:
                self._counts[place] += 1
        self._num_counted = num_known
        self._last = tokens[num_known - 1]

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens of prompt and outputs."""
        return self._ids[: self._num_distinct]

    @property
    def output_counts(self) -> np.ndarray:
        """How often each of `ids` is among the outputs."""
        return self._counts[: self._num_distinct]

    def _add(self, token: int) -> int:
        place = self._num_distinct
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token
        self._place[token] = place
        self._num_distinct += 1
        return place


class PenaltyCounts:
    """Histories of the requests seen last, at most `_MAX_HISTORIES`; a forgotten one is counted anew."""

    def __init__(self) -> None:
        self._histories: OrderedDict[RequestId, TokenHistory] = OrderedDict()

    def apply(self, logits_RV: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """Change, in place, the float32 logits of the rows whose requests have penalties; row i is chunk i's.

        Repetition (arXiv 1909.05858, as transformers computes it) counts prompt and outputs: positive logits are
        divided by it, negative ones multiplied. Frequency and presence (OpenAI's API reference) count outputs alone.
        """
        rows = [row for row, chunk in enumerate(chunks) if has_penalties(chunk.request.sampling)]
        if not rows:
            return
        histories = [self._history(chunks[row]) for row in rows]
        samplings = [chunks[row].request.sampling for row in rows]
        lengths = [len(history.ids) for history in histories]
        device, vocab_size = logits_RV.device, logits_RV.shape[1]

        def spread(values: Sequence[float]) -> torch.Tensor:
            return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(device)

        places = np.concatenate([row * vocab_size + h.ids for row, h in zip(rows, histories, strict=True)])
        places_N = torch.from_numpy(places).to(device)
        counts_N = torch.from_numpy(np.concatenate([history.output_counts for history in histories])).to(device)
        repetition_N = spread([sampling.repetition_penalty for sampling in samplings])
        frequency_N = spread([sampling.frequency_penalty for sampling in samplings])
        presence_N = spread([sampling.presence_penalty for sampling in samplings])
        flat = logits_RV.view(-1)
        old_N = flat[places_N]
        new_N = torch.where(old_N > 0, old_N / repetition_N, old_N * repetition_N)
        flat[places_N] = new_N - frequency_N * counts_N - presence_N * (counts_N > 0)

    def _history(self, chunk: Chunk) -> TokenHistory:
        request, num_known = chunk.request, chunk.start + chunk.num_tokens
        history = self._histories.pop(request.id, None)
        if history is None or not history.follows(chunk.tokens, num_known):
            history = TokenHistory()
        history.extend(chunk.tokens, num_known, request.num_prompt_tokens)
        self._histories[request.id] = history
        if len(self._histories) > _MAX_HISTORIES:
            self._histories.popitem(last=False)
        return history
