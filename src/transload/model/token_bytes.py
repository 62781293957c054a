"""The bytes that each token stands for, so that text can be put together token by token. No files, no torch.

Two ways of writing bytes as tokens cover the Llama family, and a tokenizer's decoder tells which one it is:
byte-level (each byte is one printable character) and SentencePiece with byte fallback (text with "▁" for a space,
and tokens such as <0x0A>).
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, Literal

from tokenizers import Tokenizer

from transload.errors import CheckpointError

Scheme = Literal["byte_level", "sentencepiece"]
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Looks up tokens one by one and remembers them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        self.scheme: Scheme
        self.scheme, self.strips_first_space = _scheme(decoder)
        self.special_ids = frozenset(
            number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes; none if there is no such token (models have more rows than tokens)."""
        known = self._known.get(token_id)
        if known is not None:
            return known
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:  # not remembered: callers may ask for any number
            return b""
        found = self._known[token_id] = self._bytes_of(token)
        return found

    def _bytes_of(self, token: str) -> bytes:
        if self.scheme == "byte_level":
            try:
                return bytes([_byte_of()[character] for character in token])
            except KeyError:  # an added token, written as plain text
                return token.encode()
        if (match := BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()


@cache
def byte_characters() -> tuple[str, ...]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte) if byte in printable else chr(256 + unprintable.index(byte)) for byte in range(256))


@cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def _scheme(decoder: dict[str, Any]) -> tuple[Scheme, bool]:
    """The scheme, and whether decoding drops the first space of a text."""
    kind = decoder.get("type")
    if kind == "ByteLevel":
        return "byte_level", False
    steps = decoder.get("decoders", []) if kind == "Sequence" else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        strips = kinds[3:] == ["Strip"] and steps[3].get("start") == 1 and steps[3].get("content") == " "
        return "sentencepiece", strips
    raise CheckpointError(
        f"tokenizer.json: decoder {kind!r} {kinds or ''} is not implemented, "
        "wanted ByteLevel or SentencePiece with byte fallback (Replace, ByteFallback, Fuse, Strip)"
    )
