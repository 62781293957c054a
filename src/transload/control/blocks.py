"""The KV blocks of one worker: who holds them, what they contain, which may be given away.

Each block is in exactly one state, and the four counts always sum to the total:

    free          holds nothing
    referenced    held by one or more requests
    cached        held by nobody, but its contents have a key and may be found again; evicted oldest first
    quarantined   given up while another worker may still be writing into it; nobody's until that is ruled out
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted blocks with a prefix cache. Block ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._quarantined: dict[object, list[int]] = {}
        self._num_quarantined = 0
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    @property
    def num_tokens(self) -> int:
        """How many all blocks hold."""
        return self.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_quarantined(self) -> int:
        return self._num_quarantined

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached) - self._num_quarantined

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of `keys`. Does not modify the pool."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def room_beside(self, prefix: Sequence[int]) -> int:
        """Blocks that can be handed out once those of a matched prefix are referenced."""
        room = len(self._free) + len(self._cached)
        return room - sum(1 for block in prefix if not self._references[block]) if prefix else room

    def acquire(self, prefix: Sequence[int], num_new: int) -> list[int] | None:
        """Reference the blocks of a matched prefix and allocate `num_new` more. None: no room, nothing changed."""
        references, free = self._references, self._free
        if (prefix or num_new > len(free)) and num_new > self.room_beside(prefix):
            return None
        for block in prefix:
            if not references[block]:
                del self._cached[block]
            references[block] += 1
        taken: list[int] = []
        if 0 < num_new <= len(free):
            taken = free[-num_new:]
            del free[-num_new:]
            taken.reverse()
            for block in taken:
                references[block] = 1
        elif num_new:
            taken = [self._take() for _ in range(num_new)]
        return [*prefix, *taken]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget_key(block)
        self._references[block] = 1
        return block

    def _forget_key(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        self._keys[block] = None
        del self._by_key[key]
        if key in self._stored:
            del self._stored[key]
        else:
            self._evicted[key] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block. Later blocks of a request become evictable before earlier ones:
        a block is useless without those before it."""
        references, keys, free = self._references, self._keys, self._free
        if not self._by_key:  # nothing was ever shared: each has one holder, and nobody finds it again
            for block in blocks:
                assert references[block] == 1, f"block {block} is released but nobody holds it"
                references[block] = 0
            free.extend(reversed(blocks))
            return
        for block in reversed(blocks):
            left = references[block] - 1
            assert left >= 0, f"block {block} is released but nobody holds it"
            references[block] = left
            if left:
                continue
            if keys[block] is None:
                free.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, key: bytes) -> None:
        """Say that a referenced block now holds what `key` names, for others to find."""
        assert self._references[block] > 0, f"block {block} gets a key but nobody holds it"
        if key in self._by_key or self._keys[block] is not None:
            return
        self._keys[block] = key
        self._by_key[key] = block
        if key in self._evicted:
            del self._evicted[key]
        else:
            self._stored[key] = None

    def quarantine(self, blocks: Sequence[int], owner: object) -> None:
        """Take singly referenced, keyless blocks out of use until `end_quarantine(owner)`."""
        for block in blocks:
            assert self._references[block] == 1, f"block {block} is shared"
            assert self._keys[block] is None, f"block {block} can be found by others"
            self._references[block] = 0
        self._quarantined.setdefault(owner, []).extend(blocks)
        self._num_quarantined += len(blocks)

    def end_quarantine(self, owner: object) -> int:
        """No write into these blocks can come any more: they are free. Returns how many."""
        blocks = self._quarantined.pop(owner, [])
        self._num_quarantined -= len(blocks)
        self._free.extend(blocks)
        return len(blocks)

    def is_quarantined(self, owner: object) -> bool:
        return owner in self._quarantined

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys stored and evicted since the last call."""
        if not self._stored and not self._evicted:
            return (), ()
        changes = tuple(self._stored), tuple(self._evicted)
        self._stored.clear()
        self._evicted.clear()
        return changes

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the block tables of all requests that hold blocks. For tests."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held == self._references, "a reference without a holder, or a holder without a reference"
        quarantined = [block for blocks in self._quarantined.values() for block in blocks]
        idle = [*self._free, *self._cached, *quarantined]
        num_referenced = self.num_blocks - held.count(0)
        assert not any(map(held.__getitem__, idle)), "a block is held, and free or cached or quarantined"
        assert len(set(idle)) == len(idle) == self.num_blocks - num_referenced, "a block is in two states, or in none"
        assert self._num_quarantined == len(quarantined)
        assert not any(map(self._keys.__getitem__, (*self._free, *quarantined)))
        assert len(self._by_key) == self.num_blocks - self._keys.count(None)
        assert list(map(self._keys.__getitem__, self._by_key.values())) == list(self._by_key)
