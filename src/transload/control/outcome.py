"""What has become of a transfer: the exchange's answers to the engine. Data only."""

from __future__ import annotations

import msgspec

from transload.control.work import Work


class Verified(msgspec.Struct, frozen=True):
    """The work's KV cache is complete and intact: it may run."""

    work: Work


class Released(msgspec.Struct, frozen=True):
    """The receiver has taken over: the sender's blocks are no longer needed."""

    work: Work


class Failed(msgspec.Struct, frozen=True):
    """This transfer will not complete. The exchange has closed its side and dealt with the blocks."""

    work: Work
    reason: str


Outcome = Verified | Released | Failed
