"""How much of a machine or an endpoint is measured."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

Say = Callable[[str], None]
TOGETHER_SECONDS = 4.0


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
    def together_seconds(self) -> float:
        return 0.5 if self.quick else TOGETHER_SECONDS
