"""Damage to bytes, drawn from a seed: what a fuzzer does to a valid input, the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


def mutations(raw: bytes, seed: int, count: int, *, most_changes: int = 4) -> Iterator[bytes]:
    """Damaged copies of `raw`."""
    random = Random(seed)
    for _ in range(count):
        damaged = bytearray(raw)
        for _ in range(random.randint(1, most_changes)):
            if damaged:
                _damage(damaged, random)
        yield bytes(damaged)


def _damage(raw: bytearray, random: Random) -> None:
    """Flip a bit, write another byte or an extreme number, cut, repeat, swap or leave out a stretch."""
    place = random.randrange(len(raw))
    length = random.choice((1, 2, 4, 8, 16, 100))
    match random.randrange(7):
        case 0:
            raw[place] ^= 1 << random.randrange(8)
        case 1:
            raw[place] = random.randrange(256)
        case 2:
            width = random.choice((1, 2, 4, 8))
            number = (random.choice(EXTREMES) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            raw[place : place + width] = number
        case 3:
            del raw[place:]
        case 4:
            raw[place:place] = raw[place : place + length]
        case 5:
            other = random.randrange(len(raw))
            raw[place : place + length] = raw[other : other + length]
        case _:
            del raw[place : place + length]
