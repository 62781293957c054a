"""What the prompts of a workload say: token ids or words drawn from (seed, block hash, place) alone.

Equal hashes give equal text, so the prefix caches of a live server see the sharing that a trace recorded. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from transload.study.workload import ArrivalSpec

_UNIQUE = 1 << 63
"""Marks the hash of a prompt that shares nothing: no trace's hash has this bit once masked to 63."""

_WORDS = (
    "the of and to in a is that for it was on as with by at from his be which have or had not are but one were "
    "all their there been has when who will more no if out so what up said about other into than its time only "
    "could new them man some these two may first then do any like my now over such our me even most made after "
    "also did many before must through years where much way well down should because long each just state those "
    "people too place little good very make world still own see men work life get here between both being under "
    "never day same another know while last might us great old year off come since against right came take used "
    "himself few house use during without again American around small found thought went say part once general "
    "high upon school every number system water group point light city business family head power often order "
    "early white name night next end turn face thing given best "
)
COMMON_WORDS = tuple(_WORDS.split())


class Vocabulary(msgspec.Struct, frozen=True):
    """What prompts are made of. With `words`, each is one token of the served model when written after a space."""

    ids: tuple[int, ...]
    words: tuple[str, ...] = COMMON_WORDS
    num_overhead_tokens: int = 0
    """Tokens that the server adds around a text prompt (a chat template, a beginning-of-text token)."""


class Prompts:
    """Makes the prompts of a workload."""

    def __init__(self, vocabulary: Vocabulary, *, seed: int, block_size: int) -> None:
        """`block_size`: the workload's, tokens that one hash stands for."""
        assert vocabulary.ids
        assert vocabulary.words
        self._ids = np.array(vocabulary.ids, dtype=np.int64)
        self._words = vocabulary.words
        self._num_overhead_tokens = vocabulary.num_overhead_tokens
        self._seed = seed
        self._block_size = block_size

    def ids(self, index: int, arrival: ArrivalSpec) -> list[int]:
        """Exactly as many token ids as the arrival asks for. `index` is its place in the workload."""
        places = self._draw(index, arrival, arrival.num_input_tokens, len(self._ids))
        ids: list[int] = self._ids[places].tolist()
        return ids

    def text(self, index: int, arrival: ArrivalSpec) -> str:
        """Words that make as many tokens, the server's own additions included; at least one word."""
        num_words = max(1, arrival.num_input_tokens - self._num_overhead_tokens)
        places = self._draw(index, arrival, num_words, len(self._words))
        return " ".join([self._words[place] for place in places.tolist()])

    def _draw(self, index: int, arrival: ArrivalSpec, count: int, below: int) -> npt.NDArray[np.int64]:
        """`count` numbers below `below`, a function of seed, hash and place."""
        hashes: Sequence[int] = [number & (_UNIQUE - 1) for number in arrival.block_hashes] or [_UNIQUE | index]
        size = self._block_size if arrival.block_hashes else count
        blocks = np.array(hashes, dtype=np.uint64)
        # Mixing the hash before the place is added keeps neighbouring hashes from giving shifted copies of one text.
        keys = _mix(blocks + _mix(np.array([self._seed], dtype=np.uint64)))
        drawn = _mix(keys[:, None] + np.arange(size, dtype=np.uint64)[None, :]).reshape(-1)[:count]
        assert len(drawn) == count, "an arrival has a hash for every block it starts"
        return (drawn % np.uint64(below)).astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's output function over an array, modulo 2**64 (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
