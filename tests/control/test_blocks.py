"""The block pool: states, order of eviction, sharing, quarantine; and a machine that tries everything in any order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from transload.control.blocks import BlockPool


def key(number: int) -> bytes:
    return bytes([number])


def states(pool: BlockPool) -> tuple[int, int, int, int]:
    """(free, referenced, cached, quarantined)."""
    return pool.num_free, pool.num_referenced, pool.num_cached, pool.num_quarantined


def taken(pool: BlockPool, num_blocks: int, keys: str = "") -> list[int]:
    """So many new blocks, the first of which get these keys."""
    blocks = pool.acquire((), num_blocks)
    assert blocks is not None
    for block, letter in zip(blocks, keys, strict=False):
        pool.register(block, letter.encode())
    return blocks


def keys(letters: str) -> list[bytes]:
    return [letter.encode() for letter in letters]


def test_blocks_go_from_free_to_referenced_and_back() -> None:
    pool = BlockPool(4, 16)
    assert states(pool) == (4, 0, 0, 0)
    blocks = taken(pool, 3)
    assert blocks == [0, 1, 2]
    assert states(pool) == (1, 3, 0, 0)
    pool.release(blocks)
    assert states(pool) == (4, 0, 0, 0)


def test_blocks_with_a_key_stay_and_can_be_found() -> None:
    pool = BlockPool(4, 16)
    blocks = taken(pool, 3, "ab")
    assert pool.match(keys("abc")) == blocks[:2]
    pool.release(blocks)
    assert states(pool) == (2, 0, 2, 0)
    assert pool.match(keys("abc")) == blocks[:2]
    assert pool.acquire(pool.match(keys("ab")), 1) is not None
    assert states(pool) == (1, 3, 0, 0)


def test_a_match_ends_at_the_first_block_that_is_missing() -> None:
    pool = BlockPool(4, 16)
    taken(pool, 3, "acd")
    assert pool.match(keys("abcd")) == [0]
    assert pool.match(keys("bcd")) == []


def test_too_many_blocks_are_refused_and_nothing_changes() -> None:
    pool = BlockPool(4, 16)
    pool.release(taken(pool, 2, "ab"))
    assert pool.acquire((), 5) is None
    assert pool.acquire(pool.match(keys("ab")), 3) is None  # two blocks cannot be both kept and evicted
    assert states(pool) == (2, 0, 2, 0)
    assert pool.room_beside(pool.match(keys("ab"))) == 2
    assert pool.acquire(pool.match(keys("ab")), 2) is not None
    assert states(pool) == (0, 4, 0, 0)


def test_a_block_is_shared_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(4, 16)
    blocks = taken(pool, 2, "ab")
    assert pool.acquire(pool.match(keys("a")), 0) == blocks[:1]
    pool.release(blocks)
    assert states(pool) == (2, 1, 1, 0)
    pool.release(blocks[:1])
    assert states(pool) == (2, 0, 2, 0)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(blocks[:1])


def test_children_are_evicted_before_their_parents_and_the_longest_unused_first() -> None:
    pool = BlockPool(5, 16)
    old, new = taken(pool, 3, "abc"), taken(pool, 2, "xy")
    pool.release(old)
    pool.release(new)
    assert [pool.acquire((), 1) for _ in range(5)] == [[old[2]], [old[1]], [old[0]], [new[1]], [new[0]]]


def test_a_use_makes_a_cached_prefix_young_again() -> None:
    pool = BlockPool(4, 16)
    old, new = taken(pool, 2, "ab"), taken(pool, 2, "xy")
    pool.release(old)
    pool.release(new)
    pool.release(pool.acquire(pool.match(keys("ab")), 0) or [])
    assert pool.acquire((), 2) == new[::-1]


def test_free_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(3, 16)
    pool.release(taken(pool, 1, "a"))
    assert pool.acquire((), 2) is not None
    assert pool.match(keys("a")) == [0]


def test_the_second_block_with_the_same_contents_gets_no_key() -> None:
    pool = BlockPool(4, 16)
    first, second = taken(pool, 1, "a"), taken(pool, 1, "a")
    assert pool.match(keys("a")) == first
    pool.release(second)
    assert states(pool) == (3, 1, 0, 0)


def test_a_block_keeps_its_first_key() -> None:
    pool = BlockPool(4, 16)
    (block,) = taken(pool, 1, "a")
    pool.register(block, b"b")
    assert pool.match([b"b"]) == []
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.register(3, b"c")


def test_quarantined_blocks_are_nobodys_until_the_quarantine_ends() -> None:
    pool = BlockPool(4, 16)
    blocks = taken(pool, 3)
    pool.quarantine(blocks[1:], "transfer")
    pool.release(blocks[:1])
    assert states(pool) == (2, 0, 0, 2)
    assert pool.acquire((), 3) is None
    assert pool.is_quarantined("transfer")
    assert pool.end_quarantine("another") == 0
    assert pool.end_quarantine("transfer") == 2
    assert not pool.is_quarantined("transfer")
    assert pool.end_quarantine("transfer") == 0
    assert states(pool) == (4, 0, 0, 0)


def test_what_others_share_or_can_find_is_not_put_aside() -> None:
    pool = BlockPool(4, 16)
    blocks = taken(pool, 2, "a")
    with pytest.raises(AssertionError, match="can be found"):
        pool.quarantine(blocks[:1], "transfer")
    pool.acquire(blocks[1:], 0)
    with pytest.raises(AssertionError, match="shared"):
        pool.quarantine(blocks[1:], "transfer")


def test_changes_are_told_once_and_what_cancels_out_is_not_told() -> None:
    pool = BlockPool(2, 16)
    first = taken(pool, 2, "ab")
    assert pool.take_changes() == ((b"a", b"b"), ())
    assert pool.take_changes() == ((), ())
    pool.release(first)
    again = taken(pool, 2, "cb")  # evicts b and a; b comes back, c is new
    assert pool.take_changes() == ((b"c",), (b"a",))
    pool.release(again)
    taken(pool, 1)
    pool.release(taken(pool, 1, "z"))
    taken(pool, 1)  # z came and went
    assert pool.take_changes() == ((), (b"b", b"c"))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(4, 16).blocks_for(num_tokens) == num_blocks


class AnyOrder(RuleBasedStateMachine):
    """Requests take, share, name, release and put aside blocks in any order; a router believes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 16)
        self.tables: dict[int, list[int]] = {}
        self.num_tables = 0
        self.believed: set[bytes] = set()
        self.quarantines: set[int] = set()

    def some_table(self, draw: Any) -> int:
        table: int = draw.draw(st.sampled_from(sorted(self.tables)))
        return table

    @rule(chain=st.lists(st.integers(0, 5), max_size=4, unique=True), num_new=st.integers(0, 6))
    def acquire(self, chain: list[int], num_new: int) -> None:
        before = states(self.pool)
        prefix = self.pool.match(key(number) for number in chain)
        blocks = self.pool.acquire(prefix, num_new)
        if blocks is None:
            assert states(self.pool) == before
            assert self.pool.room_beside(prefix) < num_new
        else:
            assert blocks[: len(prefix)] == prefix
            assert len(blocks) == len(prefix) + num_new
            assert len(set(blocks)) == len(blocks)
            self.num_tables += 1
            self.tables[self.num_tables] = blocks

    @precondition(lambda self: self.tables)
    @rule(draw=st.data(), number=st.integers(0, 5))
    def register(self, draw: Any, number: int) -> None:
        blocks = self.tables[self.some_table(draw)]
        if blocks:
            self.pool.register(draw.draw(st.sampled_from(blocks)), key(number))

    @precondition(lambda self: self.tables)
    @rule(draw=st.data())
    def release(self, draw: Any) -> None:
        self.pool.release(self.tables.pop(self.some_table(draw)))

    @precondition(lambda self: self.tables)
    @rule(draw=st.data())
    def put_aside(self, draw: Any) -> None:
        name = self.some_table(draw)
        blocks = self.tables.pop(name)
        own = [block for block in blocks if self.pool._references[block] == 1 and self.pool._keys[block] is None]
        self.pool.release([block for block in blocks if block not in own])
        self.pool.quarantine(own, name)
        self.quarantines.add(name)

    @precondition(lambda self: self.quarantines)
    @rule(draw=st.data())
    def end_quarantine(self, draw: Any) -> None:
        name = draw.draw(st.sampled_from(sorted(self.quarantines)))
        self.quarantines.discard(name)
        before = self.pool.num_free
        num_freed = self.pool.end_quarantine(name)
        assert self.pool.num_free == before + num_freed

    @rule()
    def tell(self) -> None:
        stored, evicted = self.pool.take_changes()
        assert not self.believed & set(stored), "stored twice"
        assert set(evicted) <= self.believed, "evicted before it was stored"
        self.believed = (self.believed - set(evicted)) | set(stored)
        assert self.believed == set(self.pool._by_key)

    @invariant()
    def everything_adds_up(self) -> None:
        self.pool.check(self.tables.values())
        assert sum(states(self.pool)) == self.pool.num_blocks
        assert self.pool.num_available == self.pool.num_free + self.pool.num_cached


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
