"""What the front end needs of a tokenizer. Owns no tokenizer and must never import one's library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class TokenTable(Protocol):
    """What each token is, byte for byte."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def strips_first_space(self) -> bool: ...

    def __getitem__(self, token_id: int) -> bytes: ...


class Tokenizer(Protocol):
    """Text to tokens and back, for the served model."""

    @property
    def token_table(self) -> TokenTable: ...

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    @property
    def context_length(self) -> int: ...

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text. `special`: with the tokens the model wants around a text (BOS)."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """The prompt text that the checkpoint's chat template makes of a conversation.

        Raises `RequestError` if the template refuses it.
        """
        ...

    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
