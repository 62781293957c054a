"""How a KV cache lies in memory: blocks first, so that one block is one run of bytes.

    [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]

A *cell* is one layer of one block: contiguous, `cell_bytes` long. Block b starts at b * block_bytes, its layer l at
b * block_bytes + l * cell_bytes. Heads come before positions, so that a head's keys of a block are one run too, and
attention multiplies them as they are gathered. Both ends of a handoff must agree on all of this and on what the numbers
mean; the digest says so in 16 bytes and is compared before anything is sent.
"""

from __future__ import annotations

import hashlib

import msgspec

from transload.arch import DTYPE_BYTES, ModelArch


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a cache and the identity of what it holds."""

    model: str
    """Digest of the weights' identity (name, revision, file size): caches of other weights never mix."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def cell_bytes(self) -> int:
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.cell_bytes

    @property
    def digest(self) -> bytes:
        """16 bytes that two workers must share to exchange KV; also the namespace of prefix keys."""
        return hashlib.sha256(b"transload-kv-1" + msgspec.msgpack.encode(self)).digest()[:16]


def kv_layout(arch: ModelArch, identity: str, block_size: int, dtype: str) -> KvLayout:
    """The layout of a model's cache; `identity` names its weights."""
    return KvLayout(
        model=identity,
        num_layers=arch.num_layers,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        block_size=block_size,
        dtype=dtype,
    )
