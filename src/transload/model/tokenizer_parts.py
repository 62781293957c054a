"""What a tokenizer is made of, whichever files it was read from."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """`templates` by name (`default`, `tool_use`); `special_tokens` as chat templates name them (`bos_token`, ...)."""

    tokenizer: Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    templates: dict[str, str] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
