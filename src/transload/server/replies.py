"""The bytes of answers: OpenAI's JSON, in pieces that are encoded once a call and joined once a step.

A style knows one of the two APIs. Nothing here knows how text is made or sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from transload.control.messages import TokenLogprobs

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


class Usage(msgspec.Struct, frozen=True):
    """What a call used: each prompt counts once, whatever n is."""

    num_prompt_tokens: int
    num_outputs: int
    num_cached_tokens: int

    def encode(self) -> bytes:
        return _encode(
            {
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_outputs,
                "total_tokens": self.num_prompt_tokens + self.num_outputs,
                "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            }
        )


class TokenNames(Protocol):
    """How a token is called in log-probabilities."""

    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class TokenIds:
    """Tokens called by number, `token_id:17`, so that no two share a name (vLLM's return_tokens_as_token_ids)."""

    def __init__(self, tokenizer: TokenNames) -> None:
        self._tokenizer = tokenizer

    def token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}"

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)


class TokenEntry(msgspec.Struct, frozen=True):
    """A drawn token with its log-probabilities, and where in the output text it begins (in characters)."""

    token: int
    start: int
    logprobs: TokenLogprobs


class Style(Protocol):
    """One API's way to say things. `index` is the choice's."""

    def opening(self, index: int) -> bytes:
        """Event before the first text of a choice; may be empty."""
        ...

    def delta(self, index: int, text: str, entries: Sequence[TokenEntry]) -> bytes:
        """Event with more text."""
        ...

    def ending(self, index: int, reason: str) -> bytes:
        """Event that ends a choice."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """Event with the call's usage, no choices."""
        ...

    def whole(self, choices: Sequence[tuple[str, Sequence[TokenEntry], str]], usage: Usage) -> bytes:
        """Answer to a call that does not stream: text, entries and finish reason of each choice."""
        ...


class _Envelope:
    """What both styles share: the head of every event and answer of one call."""

    def __init__(self, kind: str, chunk_kind: str, call_id: str, created: int, model: str, usage_wanted: bool) -> None:
        tail = f'","created":{created},"model":{_encode(model).decode()},"choices":['.encode()
        head = b'{"id":' + _encode(call_id) + b',"object":"'
        self.whole_head = head + kind.encode() + tail
        self.event_head = b"data: " + head + chunk_kind.encode() + tail
        # OpenAI: with include_usage, every event but the last says usage: null.
        self.event_tail = b'}],"usage":null}\n\n' if usage_wanted else b"}]}\n\n"
        self.text_tail = b',"finish_reason":null' + self.event_tail

    def usage_event(self, usage: Usage) -> bytes:
        return self.event_head + b'],"usage":' + usage.encode() + b"}\n\n"


class ChatStyle:
    """`chat.completion` and its chunks."""

    def __init__(self, tokenizer: TokenNames, call_id: str, created: int, model: str, usage_wanted: bool) -> None:
        self._tokenizer = tokenizer
        self._envelope = _Envelope("chat.completion", "chat.completion.chunk", call_id, created, model, usage_wanted)
        self._plain_tail = b'},"logprobs":null' + self._envelope.text_tail

    def opening(self, index: int) -> bytes:
        head = self._envelope.event_head + b'{"index":%d,"delta":{"role":"assistant","content":""' % index
        return head + self._plain_tail

    def delta(self, index: int, text: str, entries: Sequence[TokenEntry]) -> bytes:
        envelope = self._envelope
        head = b'%b{"index":%d,"delta":{"content":%b' % (envelope.event_head, index, _encode(text))
        if not entries:
            return head + self._plain_tail
        return head + b'},"logprobs":' + _encode(self._logprobs(entries)) + envelope.text_tail

    def ending(self, index: int, reason: str) -> bytes:
        envelope = self._envelope
        return b'%b{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"%b' % (
            envelope.event_head,
            index,
            reason.encode(),
            envelope.event_tail,
        )

    def usage(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def whole(self, choices: Sequence[tuple[str, Sequence[TokenEntry], str]], usage: Usage) -> bytes:
        encoded = [
            _encode(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": self._logprobs(entries) if entries else None,
                    "finish_reason": reason,
                }
            )
            for index, (text, entries, reason) in enumerate(choices)
        ]
        return b'%b%b],"usage":%b}' % (self._envelope.whole_head, b",".join(encoded), usage.encode())

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, object]:
        content = []
        for entry in entries:
            shown = self._token(entry.token, entry.logprobs.logprob)
            shown["top_logprobs"] = [self._token(token, logprob) for token, logprob in entry.logprobs.top]
            content.append(shown)
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, object]:
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


class CompletionStyle:
    """`text_completion`, streamed or whole."""

    def __init__(
        self,
        tokenizer: TokenNames,
        call_id: str,
        created: int,
        model: str,
        usage_wanted: bool,
        echoed: Sequence[str] = (),
    ) -> None:
        """`echoed`: the prompt's text to begin each choice with; empty if none is to be echoed."""
        self._tokenizer = tokenizer
        self._echoed = echoed
        self._envelope = _Envelope("text_completion", "text_completion", call_id, created, model, usage_wanted)
        self._plain_tail = b',"logprobs":null' + self._envelope.text_tail

    def opening(self, index: int) -> bytes:
        return self.delta(index, self._echoed[index], ()) if self._echoed else b""

    def delta(self, index: int, text: str, entries: Sequence[TokenEntry]) -> bytes:
        envelope = self._envelope
        head = b'%b{"index":%d,"text":%b' % (envelope.event_head, index, _encode(text))
        if not entries:
            return head + self._plain_tail
        return head + b',"logprobs":' + _encode(self._logprobs(entries)) + envelope.text_tail

    def ending(self, index: int, reason: str) -> bytes:
        envelope = self._envelope
        return b'%b{"index":%d,"text":"","logprobs":null,"finish_reason":"%b"%b' % (
            envelope.event_head,
            index,
            reason.encode(),
            envelope.event_tail,
        )

    def usage(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def whole(self, choices: Sequence[tuple[str, Sequence[TokenEntry], str]], usage: Usage) -> bytes:
        encoded = [
            _encode(
                {
                    "index": index,
                    "text": (self._echoed[index] if self._echoed else "") + text,
                    "logprobs": self._logprobs(entries) if entries else None,
                    "finish_reason": reason,
                }
            )
            for index, (text, entries, reason) in enumerate(choices)
        ]
        return b'%b%b],"usage":%b}' % (self._envelope.whole_head, b",".join(encoded), usage.encode())

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, object]:
        text = self._tokenizer.token_text
        return {
            "tokens": [text(entry.token) for entry in entries],
            "token_logprobs": [finite(entry.logprobs.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.start for entry in entries],
        }

    def _top(self, entry: TokenEntry) -> dict[str, float]:
        """The best tokens by text, the drawn one among them. Tokens of equal text share an entry: the better's."""
        shown: dict[str, float] = {}
        for token, logprob in (*entry.logprobs.top, (entry.token, entry.logprobs.logprob)):
            text = self._tokenizer.token_text(token)
            shown[text] = max(shown.get(text, float("-inf")), finite(logprob))
        return shown


def finite(logprob: float) -> float:
    """JSON has no infinities; -9999 stands for never, as in OpenAI's API."""
    return logprob if logprob > -9999.0 else -9999.0
