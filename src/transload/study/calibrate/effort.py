"""How much of a machine or an endpoint is measured."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from transload.study.provenance import machine_facts

Say = Callable[[str], None]
BUSY_SHARE = 0.3
"""Of the cores: with more of them at work for others, times are those of a busy machine."""
TOGETHER_SECONDS = 0.6
ROUNDS = 3


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, or a fraction of it."""

    quick: bool = False
    """A fraction of the points: to see that it runs, not to believe it."""

    @property
    def single_requests(self) -> int:
        return 2 if self.quick else 12

    @property
    def loop_requests(self) -> int:
        return 2 if self.quick else 24

    @property
    def rounds(self) -> int:
        """Everything is measured so often, with the rest between: a machine's speed changes within minutes."""
        return 1 if self.quick else ROUNDS

    @property
    def together_seconds(self) -> float:
        return 0.3 if self.quick else TOGETHER_SECONDS


def warn_if_busy(say: Say) -> None:
    """Say so if the machine has had something else to do in the last minute."""
    facts = machine_facts()
    if facts.load_average is not None and facts.load_average > BUSY_SHARE * facts.num_cores:
        say(
            f"note: load average {facts.load_average:g} on {facts.num_cores} cores: the machine has something else to "
            "do, and what is measured now will not hold when it has not"
        )
