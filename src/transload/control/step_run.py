"""Steps of an unchanged batch: how many may be planned at once, and what is reported of them together.

A run of steps is bounded by what would change the plan: the end of a request, the end of the free blocks. Whoever
computes step by step and whoever goes through a run in one go report the same.
"""

from __future__ import annotations

from transload.control.blocks import BlockPool
from transload.control.work import Work


class StepRun:
    """The run of one worker. Of at most `most_steps` steps: then its worker says how it is, whatever happens."""

    __slots__ = ("_is_decode", "_planned", "_seconds", "_works", "is_stale", "length", "most_steps", "repeats", "shape")

    def __init__(self, most_steps: int) -> None:
        self.most_steps = most_steps
        self.length = 0
        """Steps that have not been reported."""
        self.shape = (0, 0, 0)
        """Requests, prefill tokens and decode tokens in each of them."""
        self.repeats = 1
        """How many steps the one under way stands for, at most."""
        self.is_stale = False
        """Somebody has come or gone since the step under way was planned."""
        self._works: list[Work] = []
        self._is_decode = False
        self._seconds = 0.0
        self._planned = 1  # as `repeats`, until it is told how many of them there were

    def goes_on_with(self, works: list[Work]) -> bool:
        """Take note of the next step's requests. Whether they are those of the step before, each a token further."""
        if self._is_decode and works == self._works:
            return True
        self._works = works
        self._is_decode = all(work.is_decoding for work in works)
        return False

    def plan(self, pool: BlockPool) -> int:
        """How many steps these requests can be taken through with nothing to decide or to tell: nobody ends before the
        last, and the free blocks are enough."""
        self.is_stale = False
        self.repeats = self._planned = 1
        if self.most_steps > 1 and self._is_decode and self._works:
            repeats = min(self.most_steps - self.length, 1 + pool.num_free // len(self._works) * pool.block_size)
            for work in self._works:
                request = work.request
                remaining = request.max_tokens - work.num_outputs
                if request.sampling.stop_ids:
                    return 1
                if request.prompt:  # then a block that gets full can be named, for others to find
                    remaining = min(remaining, pool.block_size - work.num_computed % pool.block_size)
                if remaining < repeats:
                    repeats = remaining
            self.repeats = self._planned = repeats
        return self.repeats

    def must_end(self, pool: BlockPool) -> bool:
        """Whether the step under way has to be the last of its run: the plan is out of date, or others have taken the
        blocks it counts on."""
        if not self.is_stale and self.most_blocks(pool) <= pool.num_free:
            return False
        self.repeats = 1
        return True

    def most_blocks(self, pool: BlockPool) -> int:
        """Blocks that the run under way may take before it is over."""
        return len(self._works) * pool.blocks_for(self._planned - 1)

    def add(self, num_steps: int, seconds: float, shape: tuple[int, int, int]) -> None:
        """Steps were done."""
        self.repeats = self._planned = 1
        self.length += num_steps
        self._seconds += seconds
        self.shape = shape

    def take(self) -> tuple[float, int]:
        """Mean seconds and number of the steps since the last report, which are reported now."""
        taken = self._seconds / self.length, self.length
        self.length = 0
        self._seconds = 0.0
        return taken


def hold(work: Work, num_tokens: int, pool: BlockPool) -> None:
    """Give a request the blocks that a run of steps has gone on into: it was planned so that they are free."""
    num_new = pool.blocks_for(num_tokens) - len(work.blocks)
    if num_new > 0:
        blocks = pool.acquire((), num_new)
        assert blocks is not None
        work.blocks += blocks
