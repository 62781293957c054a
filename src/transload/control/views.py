"""What the controller knows of each worker: its room, its speed, and the prefixes in its cache."""

from __future__ import annotations

from collections.abc import Sequence

from transload.control.messages import CacheChanged, Load, Request, RequestId, WorkerId, WorkerJoined
from transload.control.rates import LinearRate


class WorkerView:
    """A live worker. What is assigned is exact; speeds and cached prefixes are the worker's own last word."""

    def __init__(self, joined: WorkerJoined) -> None:
        self.worker: WorkerId = joined.worker
        self.incarnation = joined.incarnation
        self.pool = joined.pool
        self.role = joined.role
        self.num_blocks = joined.num_blocks
        self.block_size = joined.block_size
        self.kv_bytes_per_token = joined.kv_bytes_per_token
        self.max_batch = joined.max_batch
        self.committed_blocks: dict[RequestId, int] = {}
        self.prefill_tokens: dict[RequestId, int] = {}  # assigned and not yet computed
        self.cached: set[bytes] = set()
        self.prefill_rate = LinearRate(0.01, 0.001, 256)
        self.decode_rate = LinearRate(0.01, 0.0005, 8)
        self.load: Load | None = None
        self._cache_sequence = 0
        self._committed = 0

    def commit(self, request: Request, num_tokens: int, prefill_tokens: int) -> None:
        """A request was sent here: count its blocks, and the tokens it still has to compute."""
        blocks = -(-num_tokens // self.block_size)
        self._committed += blocks - self.committed_blocks.get(request.id, 0)
        self.committed_blocks[request.id] = blocks
        if prefill_tokens:
            self.prefill_tokens[request.id] = prefill_tokens

    def release(self, request_id: RequestId) -> None:
        """A request has left."""
        self._committed -= self.committed_blocks.pop(request_id, 0)
        self.prefill_tokens.pop(request_id, None)

    def holds(self, num_tokens: int) -> bool:
        """Whether so many tokens fit if there is nobody else."""
        return num_tokens <= self.num_blocks * self.block_size

    def has_room(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens would find blocks and a place in the batch now."""
        if not self.committed_blocks:
            return True
        blocks = -(-num_tokens // self.block_size)
        return len(self.committed_blocks) < self.max_batch and self._committed + blocks <= self.num_blocks

    def keeps_pace(self, tpot_seconds: float | None) -> bool:
        """Whether one request more would leave it within so much a token."""
        if tpot_seconds is None or not self.committed_blocks:
            return True
        return self.decode_rate.seconds(len(self.committed_blocks) + 1) <= tpot_seconds

    def num_cached_tokens(self, keys: Sequence[bytes]) -> int:
        """Tokens of a prompt with these keys whose KV is believed to be here."""
        count = 0
        if not self.cached:
            return count
        for key in keys:
            if key not in self.cached:
                break
            count += 1
        return count * self.block_size

    def queue_seconds(self) -> float:
        """Until the prompts assigned here are computed."""
        waiting = self.prefill_tokens
        return self.prefill_rate.seconds_per_unit * sum(waiting.values()) if waiting else 0.0

    def take_load(self, load: Load) -> None:
        self.load = load
        if load.step_seconds <= 0:
            return
        if load.step_prefill_tokens == 0:
            self.decode_rate.observe(load.step_decode_tokens, load.step_seconds)
        elif load.step_prefill_tokens > load.step_decode_tokens:
            self.prefill_rate.observe(load.step_prefill_tokens, load.step_seconds)

    def take_cache_change(self, change: CacheChanged) -> None:
        """Follow the worker's cache. After a gap in the numbers nothing is believed until stored anew."""
        if change.sequence != self._cache_sequence + 1:
            self.cached.clear()
        self._cache_sequence = change.sequence
        self.cached.difference_update(change.evicted)
        self.cached.update(change.stored)
