"""How fast workers of one machine get on while they compute at the same time.

Pure. Two things slow a step: others want its core, and others use the memory, the caches and the power that its core
shares with theirs. The first follows from counting cores; the second was measured, for each kind of step beside each
kind of work.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from transload.hardware.measured import MeasuredSteps, WorkKind


class Work(msgspec.Struct, frozen=True):
    """What is under way somewhere on the machine."""

    kind: WorkKind
    threads: int = 1


def paces(works: Sequence[Work], measured: MeasuredSteps) -> list[float]:
    """How much of a second's work each gets done in a second, 1 being alone on the machine.

    Cores are shared evenly among threads. Where there are more threads than cores, not all of the others run whenever
    one does: they slow it so much less.
    """
    wanted = sum([work.threads for work in works])
    share = min(1.0, measured.num_cores / wanted) if wanted else 1.0
    found: list[float] = []
    for index, work in enumerate(works):
        others = [other for place, other in enumerate(works) if place != index]
        around = sum([other.threads for other in others])
        together = min(1.0, max(0, measured.num_cores - work.threads) / around) if around else 1.0
        lost = sum([measured.beside.factor(work.kind, other.kind) - 1.0 for other in others])
        found.append(share / max(0.1, 1.0 + lost * together))
    return found
