"""One request on its way through a controller of p0 and d0: how it gets to each phase."""

from __future__ import annotations

from tests.control.feeding import D0, P0, ControllerFeed, a_grant, a_request, a_token
from transload.control.messages import (
    Arrived,
    ControllerCommand,
    Emitted,
    Finish,
    KvVerified,
    Request,
    Reserved,
    Started,
    Stream,
    WorkerId,
)

GRANT = a_grant(7, (0, 1))
REQUEST = a_request(1, 6, max_tokens=3)
ONE = REQUEST.id


def ends(commands: list[ControllerCommand]) -> list[Finish]:
    return [command for command in commands if isinstance(command, Finish)]


def streamed(commands: list[ControllerCommand]) -> list[int]:
    return [command.token.index for command in commands if isinstance(command, Stream)]


def emit(feed: ControllerFeed, worker: WorkerId, *indexes: int, epoch: int = 0, finish: str | None = None) -> list[int]:
    """Which tokens go to the caller when these come from a worker."""
    tokens = tuple(a_token(REQUEST, index, epoch, finish=finish if index == indexes[-1] else None) for index in indexes)
    return streamed(feed.give(Emitted(worker, tokens)))


def phase(feed: ControllerFeed, request: Request = REQUEST) -> str:
    return feed.controller.requests[request.id].phase


def to_prefilling(feed: ControllerFeed, epoch: int = 0) -> None:
    if epoch == 0:
        feed.give(Arrived(REQUEST))
    feed.give(Reserved(D0, ONE, epoch, GRANT, 0))
    feed.give(Started(P0, ONE, epoch, 4))


def to_phase(feed: ControllerFeed, wanted: str) -> None:
    """Bring the request so far in a cluster of p0 and d0."""
    feed.give(Arrived(REQUEST))
    steps = {"reserving": 0, "prefilling": 1, "transferring": 2, "decoding": 3}[wanted]
    if steps >= 1:
        feed.give(Reserved(D0, ONE, 0, GRANT, 0))
    if steps >= 2:
        emit(feed, P0, 0)
    if steps >= 3:
        feed.give(KvVerified(D0, ONE, 0, 100, 0.1, 2))
    assert phase(feed) == wanted
