"""How an attention worker and an FFN worker meet: handshake as for KV links, then both say what they compute with.

    attention: hello, proof (+ memfd)      FFN: hello, proof, welcome
    attention: Opening (weights, slots)    FFN: Offer (weights, pieces), or a refusal by field

Owns the socket and the memory until the end of a link has them. Everything has a deadline and is refused by name:
workers with other weights, layers or number formats never compute for each other.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from typing import TypeVar

import msgspec

from transload.control.ffn_messages import Piece, SessionId
from transload.control.messages import WorkerId
from transload.errors import HandoffError
from transload.transfer.ffn_kernels import RingKernels
from transload.transfer.ffn_link import CalleeEnd, CallerEnd, SlotSizes
from transload.transfer.ffn_ring import RingCallee, RingCaller, RingMemory, create_memory
from transload.transfer.ffn_stream import StreamCallee, StreamCaller
from transload.transfer.hello import Handshake, Hello
from transload.transfer.listener import PeerAddress, family_of, host_id
from transload.transfer.wire import PREFIX, check_header, pack, tune_tcp, unpack_prefix

PROTOCOL = hashlib.sha256(b"transload-ffn-2").digest()[:16]
"""Takes the place of the KV layout's digest: a KV link and a feed-forward link never meet."""
HANDSHAKE_SECONDS = 10.0
_MAX_WORD_BYTES = 64 << 10


class FfnWeights(msgspec.Struct, frozen=True, kw_only=True):
    """What a feed-forward is a function of, beside its rows. Both sides must say the same."""

    weights: str
    """Identity of the model's files."""
    num_layers: int
    hidden_size: int
    dtype: str
    deterministic: bool


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The attention worker's word."""

    session: SessionId
    weights: FfnWeights
    sizes: SlotSizes


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The FFN worker's."""

    weights: FfnWeights
    pieces: tuple[Piece, ...]


class Declined(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Either's: why not."""

    reason: str


_Word = Opening | Offer | Declined
_T = TypeVar("_T", Opening, Offer)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Word] = msgspec.msgpack.Decoder(_Word)


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """Who speaks, and with which secret."""

    worker: WorkerId
    incarnation: int
    secret: bytes


def dial_ffn(
    me: Party, address: PeerAddress, transport: str, opening: Opening, kernels: RingKernels | None = None
) -> tuple[CallerEnd, frozenset[Piece]]:
    """A link to an FFN worker, and the pieces it owns; `kernels` are for shared memory, if there are any.

    Raises `HandoffError`, `MachineError` or `OSError`."""
    opening.sizes.check()
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    sock, one_sided = _reach(address, transport, deadline)
    memory: RingMemory | None = None
    try:
        fd: int | None = None
        if one_sided:
            fd = create_memory(opening.sizes)
            memory = RingMemory(os.dup(fd), opening.sizes)
        try:
            hello = _hello(me, one_sided, address.worker, address.incarnation)
            Handshake(sock, hello, me.secret, deadline).dial(fd)
        finally:
            if fd is not None:
                os.close(fd)
        _send(sock, opening, deadline)
        offer = _receive(sock, Offer, deadline)
        problem = difference(offer.weights, opening.weights)
        if problem is not None:
            raise HandoffError(f"{address.worker} computes something else: {problem}")
        worker = address.worker
        end: CallerEnd = (
            RingCaller(worker, memory, sock, kernels)
            if memory is not None
            else StreamCaller(worker, opening.sizes, sock)
        )
        return end, frozenset(offer.pieces)
    except BaseException:
        sock.close()
        if memory is not None:
            memory.close()
        raise


def accept_ffn(
    me: Party, sock: socket.socket, one_sided: bool, offer: Offer, kernels: RingKernels | None = None
) -> CalleeEnd:
    """A link to an attention worker that has called. Raises `HandoffError` or `OSError`."""
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    handshake = Handshake(sock, _hello(me, one_sided), me.secret, deadline)
    memory: RingMemory | None = None
    try:
        tune_tcp(sock)
        caller = handshake.accept()
        fd = handshake.take_fd() if one_sided else None
        handshake.welcome(None)
        try:
            opening = _receive(sock, Opening, deadline)
            opening.sizes.check()
            problem = difference(opening.weights, offer.weights)
            if problem is not None:
                raise HandoffError(f"{me.worker} computes something else than {caller.worker}: {problem}")
            if fd is not None:
                taken, fd = fd, None
                memory = RingMemory(taken, opening.sizes)
        except HandoffError as error:
            _send(sock, Declined(reason=str(error)), deadline)
            raise
        finally:
            if fd is not None:
                os.close(fd)
        _send(sock, offer, deadline)
        if memory is not None:
            return RingCallee(opening.session, memory, sock, kernels)
        return StreamCallee(opening.session, opening.sizes, sock)
    except BaseException:
        sock.close()
        if memory is not None:
            memory.close()
        raise
    finally:
        handshake.close()


def difference(got: FfnWeights, wanted: FfnWeights) -> str | None:
    """The first field that two sides do not agree on, in words."""
    for field in FfnWeights.__struct_fields__:
        if getattr(got, field) != getattr(wanted, field):
            return f"{field}: got {getattr(got, field)}, wanted {getattr(wanted, field)}"
    return None


def _hello(me: Party, one_sided: bool, peer: WorkerId | None = None, peer_incarnation: int = 0) -> Hello:
    return Hello(
        worker=me.worker,
        incarnation=me.incarnation,
        peer=peer,
        peer_incarnation=peer_incarnation,
        layout_digest=PROTOCOL,
        num_blocks=1,
        one_sided=one_sided,
    )


def _reach(address: PeerAddress, transport: str, deadline: float) -> tuple[socket.socket, bool]:
    """A connected socket, and whether memory can be shared over it."""
    same_host = bool(address.unix_name) and address.host_id == host_id() != ""
    if transport == "shm" and not same_host:
        raise HandoffError(f"shm needs two workers on one Linux host, and {address.worker} is on another; use tcp")
    if transport != "tcp" and same_host:
        try:
            return _connect(socket.AF_UNIX, "\0" + address.unix_name, deadline), True
        except ConnectionRefusedError:  # another network namespace, or nobody lives there any more
            if transport == "shm":
                raise
    return _connect(family_of(address.host), (address.host, address.port), deadline), False


def _connect(family: socket.AddressFamily, target: str | tuple[str, int], deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        tune_tcp(sock)
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return sock


def _send(sock: socket.socket, word: _Word, deadline: float) -> None:
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    sock.sendall(pack(_encoder.encode(word)))


def _receive(sock: socket.socket, expected: type[_T], deadline: float) -> _T:
    prefix = _read(sock, PREFIX.size, deadline)
    header_bytes, _, checksum = unpack_prefix(prefix, _MAX_WORD_BYTES)
    raw = _read(sock, header_bytes, deadline)
    check_header(prefix, raw, checksum)
    try:
        word = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandoffError(f"the peer sent no word of this handshake: {error}") from None
    if isinstance(word, Declined):
        raise HandoffError(word.reason)
    if not isinstance(word, expected):
        raise HandoffError(f"the peer sent {type(word).__name__} where {expected.__name__} is due")
    return word


def _read(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """Exactly so many: what follows belongs to the link."""
    parts = bytearray()
    while len(parts) < num_bytes:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        part = sock.recv(num_bytes - len(parts))
        if not part:
            raise HandoffError("the peer hung up during the handshake")
        parts += part
    return bytes(parts)
