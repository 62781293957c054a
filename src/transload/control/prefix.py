"""Keys of prefix blocks: a chained hash over tokens, in the namespace of one model, dtype and layout.

A key names a block's tokens and everything before them, so equal keys mean equal KV contents, and a worker with another
layout can only miss, never collide.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16


def root_key(namespace: bytes) -> bytes:
    """The parent of a request's first block. `namespace` is the layout digest."""
    return blake2b(b"transload-prefix-1" + namespace, digest_size=KEY_BYTES).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block holding `tokens` (each below 2**32) after the block named `parent`."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=KEY_BYTES).digest()


def prompt_keys(namespace: bytes, tokens: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """Keys of all full blocks of a prompt."""
    keys: list[bytes] = []
    parent = root_key(namespace)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = block_key(parent, tokens[start : start + block_size])
        keys.append(parent)
    return tuple(keys)
