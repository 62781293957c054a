"""What a worker's machine is told once, before anything happens. Data only."""

from __future__ import annotations

import msgspec

from transload.control.messages import WorkerId


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an Engine must know about its worker."""

    worker: WorkerId
    num_blocks: int
    block_size: int
    num_layers: int
    cell_bytes: int
    namespace: bytes
    """Layout digest: the root of all prefix keys."""
    max_batch: int = 64
    step_tokens: int = 512
    lease_seconds: float = 10.0
    seed: int = 0
    run_steps: int = 1
    """Most steps of an unchanged batch that are planned, and reported, at once. More than one is for whoever computes
    them in closed form: a worker that really computes takes up what comes in after each step."""
    hold_tokens: int = 0
    """Tokens of a request that are held back, until there are so many, it ends, or `ReportTokens` asks. 0: none are."""
