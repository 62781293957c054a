"""What a simulated setting answers: values by figure, what they rest on, and how they were computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from transload.study.claims.verdict import Simulated


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The simulated values of one claim's setting, by the keys of its figures. Knows no claimed value."""

    values: dict[str, Simulated]
    basis: str
    """How the setting was simulated and what was taken for granted, in a sentence or two."""
    assumptions: tuple[str, ...] = ()
    """Numbers that no source gives: `efa_trn3.latency = 20 us`."""


Setting = Callable[[], Answer]
"""A setting takes nothing: all its numbers are its own or the catalog's."""


def together(lines: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All assumptions once, in the order in which they come."""
    return tuple(dict.fromkeys(line for some in lines for line in some))
