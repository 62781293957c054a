"""The first words on a link: who is there, may they, and do both mean the same bytes.

    dialer                                acceptor
    Hello             ------->            checks name, versions, layout
                      <-------            Hello, Proof
    checks all that
    Proof (+ memfd)   ------->            checks, maps the memory
                      <-------            Welcome (+ memfd)

or a `Refusal` from either side at any point, which both report. A proof is an HMAC over both hellos, so the secret is
never sent and a proof fits only these two nonces. No side hands out its memory before the other has proved itself. Owns
the words and their deadline; never keeps a socket: its caller closes it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import time
from typing import TypeVar

import msgspec

from transload.control.messages import WorkerId
from transload.errors import HandoffError
from transload.transfer.wire import PREFIX, check_header, pack, unpack_prefix

MAGIC = "transload-link"
VERSION = 2
LINKED, CROSSED = "already linked", "dialed from both sides"
"""Refusals that are no failure: a link is there, comes up, or is about to end. The dialer looks again."""
_MAX_HEADER_BYTES = 4096
_NONCE_BYTES = 32


class _Word(msgspec.Struct, frozen=True, tag=True):
    """Words are maps, so that another version can at least be named."""


class Hello(_Word, frozen=True, kw_only=True):
    """Who speaks. `peer` and `peer_incarnation` are who the dialer wants to reach."""

    magic: str = MAGIC
    version: int = VERSION
    worker: WorkerId
    incarnation: int
    peer: WorkerId | None
    peer_incarnation: int
    layout_digest: bytes
    num_blocks: int
    one_sided: bool
    in_place: bool = False
    """Steps here can work in the other's blocks. Both must be able to, or neither does."""
    nonce: bytes = msgspec.field(default_factory=lambda: os.urandom(_NONCE_BYTES))


class Proof(_Word, frozen=True):
    """Who says this knows the secret."""

    mac: bytes


class Welcome(_Word, frozen=True):
    """The link is open."""


class Refusal(_Word, frozen=True):
    """Why there will be no link: which field, what the one who refuses got, and what it wanted."""

    field: str
    got: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.field}: got {self.got}, wanted {self.wanted}"


class LinkRefused(HandoffError):
    """One of the two sides does not want this link; `refusal` is what it said."""

    def __init__(self, message: str, refusal: Refusal, peer: WorkerId | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.peer = peer

    @property
    def is_quiet(self) -> bool:
        """Two workers met twice: nothing to report."""
        return self.refusal.field in (LINKED, CROSSED)


_Words = Hello | Proof | Welcome | Refusal
_Expected = TypeVar("_Expected", Hello, Proof, Welcome)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Words] = msgspec.msgpack.Decoder(_Words)


class _Greeting(msgspec.Struct):
    """The part of a Hello that every version has."""

    magic: str
    version: int


_greeting: msgspec.msgpack.Decoder[_Greeting] = msgspec.msgpack.Decoder(_Greeting)


class Handshake:
    """One handshake on one socket. Every step raises `HandoffError` or `OSError` and has until `deadline`
    (`time.monotonic`)."""

    def __init__(self, sock: socket.socket, me: Hello, secret: bytes, deadline: float) -> None:
        self._sock = sock
        self._me = me
        self._secret = secret
        self._deadline = deadline
        self._fd: int | None = None
        self.peer: Hello | None = None

    def dial(self, fd: int | None) -> Hello:
        """The dialer's side of it all. Gives our memory, if any; the peer's is there to `take_fd` then."""
        mine = self._send(self._me)
        theirs = self._receive_hello()
        proof = self._receive(Proof)
        self._check(proof, "acceptor", mine, theirs)
        self._send(Proof(self._mac("dialer", mine, theirs)), fd)
        self._receive(Welcome)
        assert self.peer is not None
        return self.peer

    def accept(self) -> Hello:
        """The acceptor's side, up to the point where the dialer has proved itself. Then `welcome` or `refuse`."""
        theirs = self._receive_hello()
        assert self.peer is not None
        me = msgspec.structs.replace(self._me, peer=self.peer.worker, peer_incarnation=self.peer.incarnation)
        mine = self._send(me)
        self._send(Proof(self._mac("acceptor", theirs, mine)))
        proof = self._receive(Proof)
        self._check(proof, "dialer", theirs, mine)
        return self.peer

    def welcome(self, fd: int | None) -> None:
        """Open the link; give our memory."""
        self._send(Welcome(), fd)

    def refuse(self, refusal: Refusal) -> LinkRefused:
        """Tell the peer, as far as it still listens, and return what to raise."""
        name = self.peer.worker if self.peer else None
        try:
            self._send(refusal)
        except (OSError, HandoffError):
            pass  # it has hung up: the refusal is reported on this side all the same
        return LinkRefused(f"{self._me.worker} refuses a link with {name or 'a caller'}: {refusal}", refusal, name)

    @property
    def link_name(self) -> int:
        """The same at both ends, and no other link's: out of both nonces."""
        assert self.peer is not None
        mine, theirs = (int.from_bytes(hello.nonce[:8]) for hello in (self._me, self.peer))
        return (mine ^ theirs) >> 1

    def take_fd(self) -> int:
        """The memory that the peer sent along; the caller owns it now."""
        if self._fd is None:
            raise self.refuse(Refusal("memory", "no file descriptor", "the peer's KV pool"))
        fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        """Drop memory that came and was not taken."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _receive_hello(self) -> bytes:
        raw = self._receive_raw()
        try:
            greeting = _greeting.decode(raw)
        except msgspec.DecodeError:
            pass  # a refusal, or noise
        else:
            if greeting.magic != MAGIC:
                raise self.refuse(Refusal("protocol", repr(greeting.magic[:40]), repr(MAGIC)))
            if greeting.version != VERSION:
                raise self.refuse(Refusal("protocol version", str(greeting.version), str(VERSION)))
        self.peer = self._decode(raw, Hello)
        refusal = _objection(self._me, self.peer)
        if refusal is not None:
            raise self.refuse(refusal)
        return raw

    def _receive(self, expected: type[_Expected]) -> _Expected:
        return self._decode(self._receive_raw(), expected)

    def _decode(self, raw: bytes, expected: type[_Expected]) -> _Expected:
        try:
            word = _decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise HandoffError(f"the peer sent no word of a handshake: {error}") from None
        if isinstance(word, Refusal):
            name = self.peer.worker if self.peer else self._me.peer
            raise LinkRefused(f"{name or 'a caller'} refuses a link with {self._me.worker}: {word}", word, name)
        if not isinstance(word, expected):
            raise HandoffError(f"the peer sent {type(word).__name__} where {expected.__name__} is due")
        return word

    def _check(self, proof: Proof, label: str, dialer: bytes, acceptor: bytes) -> None:
        if not hmac.compare_digest(proof.mac, self._mac(label, dialer, acceptor)):
            raise self.refuse(Refusal("secret", "a proof made with another secret", "a proof of the cluster's secret"))

    def _mac(self, label: str, dialer: bytes, acceptor: bytes) -> bytes:
        transcript = label.encode() + hashlib.sha256(dialer).digest() + hashlib.sha256(acceptor).digest()
        return hmac.digest(self._secret, transcript, "sha256")

    def _send(self, word: _Words, fd: int | None = None) -> bytes:
        raw = _encoder.encode(word)
        self._set_timeout()
        if fd is None:
            self._sock.sendall(pack(raw))
        else:
            socket.send_fds(self._sock, [pack(raw)], [fd])
        return raw

    def _receive_raw(self) -> bytes:
        prefix = self._read(PREFIX.size)
        header_bytes, payload_bytes, checksum = unpack_prefix(prefix, _MAX_HEADER_BYTES)
        if payload_bytes:
            raise HandoffError("a frame of a handshake has no payload")
        raw = self._read(header_bytes)
        check_header(prefix, raw, checksum)
        return raw

    def _read(self, num_bytes: int) -> bytes:
        """Exactly so many bytes: what follows belongs to the link."""
        parts = bytearray()
        while len(parts) < num_bytes:
            self._set_timeout()
            part = self._read_some(num_bytes - len(parts))
            if not part:
                raise HandoffError("the peer hung up during the handshake")
            parts += part
        return bytes(parts)

    def _read_some(self, num_bytes: int) -> bytes:
        if not self._me.one_sided:
            return self._sock.recv(num_bytes)
        part, fds, _, _ = socket.recv_fds(self._sock, num_bytes, 1, socket.MSG_CMSG_CLOEXEC)
        for fd in fds:
            self.close()
            self._fd = fd
        return part

    def _set_timeout(self) -> None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the handshake was not over in time")
        self._sock.settimeout(remaining)


def _objection(me: Hello, peer: Hello) -> Refusal | None:
    """What keeps these two from having a link; seen from `me`."""
    checks = (
        ("addressed worker", str(peer.peer), me.worker),
        ("addressed incarnation", str(peer.peer_incarnation), str(me.incarnation)),
        ("layout digest", peer.layout_digest.hex(), me.layout_digest.hex()),
        ("transport", _transport(peer), _transport(me)),
    )
    for name, got, wanted in checks:
        if got != wanted:
            return Refusal(name, got, wanted)
    if me.peer and (peer.worker, peer.incarnation) != (me.peer, me.peer_incarnation):
        return Refusal("worker", f"{peer.worker} #{peer.incarnation}", f"{me.peer} #{me.peer_incarnation}")
    if peer.num_blocks < 1 or len(peer.nonce) != _NONCE_BYTES or peer.worker == me.worker:
        return Refusal("hello", "a worker with my name, no blocks or no nonce", "a peer's hello")
    return None


def _transport(hello: Hello) -> str:
    return "shm" if hello.one_sided else "tcp"
