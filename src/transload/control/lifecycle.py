"""A request's phases, as the controller sees them, in one table.

    Arrived
      |
    queued -------- no worker has room yet
      |       \\
      |        reserving ------ the decode worker makes room        (split)
      |           |
    prefilling <--+
      |       \\
      |        transferring --- the first token is out, the KV cache is still on its way    (split)
      |           |
    decoding <----+
      |
    finished ------ stop | length | cancelled | error

A lost worker or a failed transfer takes a request from any phase back to `queued`, one epoch later, with the tokens it
has. Whatever happens, it ends in `finished`, once.
"""

from __future__ import annotations

from typing import Literal

Phase = Literal["queued", "reserving", "prefilling", "transferring", "decoding", "finished"]

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    "queued": frozenset({"reserving", "prefilling", "finished"}),
    "reserving": frozenset({"prefilling", "queued", "finished"}),
    "prefilling": frozenset({"transferring", "decoding", "queued", "finished"}),
    "transferring": frozenset({"decoding", "queued", "finished"}),
    "decoding": frozenset({"queued", "finished"}),
    "finished": frozenset(),
}


def check_transition(old: Phase, new: Phase) -> None:
    """Assert that a request may go from one phase to another."""
    assert new in TRANSITIONS[old], f"a request cannot go from {old} to {new}"
