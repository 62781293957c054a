"""Tokens that have been drawn: whether one is the last of its text, and what of them is told to the controller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from transload.control.messages import Token, TokenLogprobs
from transload.control.work import Work

Finish = Literal["stop", "length"]


def finish_of(work: Work) -> Finish | None:
    """Why the request ends with the token that was drawn last, or None."""
    request = work.request
    stop_ids = request.sampling.stop_ids
    if stop_ids and work.tokens[-1] in stop_ids and work.num_outputs >= request.sampling.min_tokens:
        return "stop"
    return "length" if work.num_outputs >= request.max_tokens else None


def unreported(work: Work, finish: Finish | None = None, logprobs: TokenLogprobs | None = None) -> Token:
    """All that nobody has been told of, as one message; from now on it counts as told."""
    index = work.num_reported
    tokens = work.tokens[len(work.tokens) - (work.num_outputs - index) :]
    work.num_reported = work.num_outputs
    return Token(work.request.id, work.epoch, index, tokens[0], finish, logprobs, tuple(tokens[1:]))


def all_unreported(works: Iterable[Work]) -> tuple[Token, ...]:
    """The same of several requests, those without any left out."""
    return tuple([unreported(work) for work in works if work.num_reported < work.num_outputs])
