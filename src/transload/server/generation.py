"""The two routes that make tokens: body to prompts to requests to one `Call`. Keeps the ledger of recent calls."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
import xxhash

from transload.control.messages import Request, RequestId
from transload.deploy.spec import Server
from transload.errors import RequestError
from transload.runtime.base import Backend
from transload.server.bodies import BodyReader, Receive, Scope, Send, parse_body
from transload.server.call import Call
from transload.server.choice import Choice
from transload.server.connection import CONNECTION
from transload.server.metrics import Metrics
from transload.server.parameters import Parameters, call_seed, check_parameters, choice_seed
from transload.server.prompts import Prompts, PromptTokens
from transload.server.replies import ChatStyle, CompletionStyle, Style, TokenIds, TokenNames
from transload.server.schema import ChatBody, CompletionBody, GenerationBody
from transload.server.tokens import Tokenizer

REMEMBERED_CALLS = 4096
"""How many calls `/requests/{id}` can look back."""
_PREFIXES = ("chatcmpl-", "cmpl-")
B = TypeVar("B", bound=GenerationBody)


class Ledger:
    """Which control-plane requests a call was made of, for the last calls."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, tuple[RequestId, ...]] = OrderedDict()

    def note(self, request_id: str, requests: tuple[RequestId, ...]) -> None:
        self._requests[request_id] = requests
        self._requests.move_to_end(request_id)
        if len(self._requests) > REMEMBERED_CALLS:
            self._requests.popitem(last=False)

    def look_up(self, name: str) -> tuple[RequestId, ...] | None:
        """By the call's `x-request-id`, or by the `id` in its answer."""
        found = self._requests.get(name)
        if found is None:
            for prefix in _PREFIXES:
                if name.startswith(prefix):
                    return self._requests.get(name.removeprefix(prefix))
        return found


class Generation:
    """Answers `/v1/chat/completions` and `/v1/completions`."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        prompts: Prompts,
        server: Server,
        bodies: BodyReader,
        seed: int,
        metrics: Metrics,
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._server = server
        self._bodies = bodies
        self._seed = seed
        self._metrics = metrics
        self._num_calls = 0
        self._eos_ids = tuple(tokenizer.eos_ids)
        self.ledger = Ledger()
        self.open_calls: set[Call] = set()

    async def chat(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Raises `RequestError` if nothing of an answer was sent yet, `CallerGone` if there is no one to answer."""

        def style(_body: ChatBody, parameters: Parameters, _prompts: Sequence[PromptTokens]) -> Style:
            name = f"chatcmpl-{request_id}"
            created, model = int(time.time()), self._backend.model.name
            return ChatStyle(self._names(parameters), name, created, model, parameters.include_usage)

        await self._answer(ChatBody, self._prompts.of_chat, style, scope, receive, send, request_id)

    async def completion(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Raises as `chat` does."""

        def style(body: CompletionBody, parameters: Parameters, prompts: Sequence[PromptTokens]) -> Style:
            name = f"cmpl-{request_id}"
            created, model = int(time.time()), self._backend.model.name
            echoed = [p.text for p in prompts for _ in range(parameters.num_choices)] if body.echo else []
            return CompletionStyle(self._names(parameters), name, created, model, parameters.include_usage, echoed)

        await self._answer(CompletionBody, self._prompts.of_completion, style, scope, receive, send, request_id)

    def _names(self, parameters: Parameters) -> TokenNames:
        return TokenIds(self._tokenizer) if parameters.name_tokens_by_id else self._tokenizer

    async def _answer(
        self,
        kind: type[B],
        make_prompts: Callable[[B, Parameters], Awaitable[list[PromptTokens]]],
        make_style: Callable[[B, Parameters, Sequence[PromptTokens]], Style],
        scope: Scope,
        receive: Receive,
        send: Send,
        request_id: str,
    ) -> None:
        arrived = time.monotonic()
        route = scope["path"]
        try:
            raw = await self._bodies.read(scope, receive)
            body = parse_body(raw, kind)
            check_model(self._backend, body.model)
            parameters = check_parameters(body, self._prompts.vocab_size, self._eos_ids)
            prompts = await make_prompts(body, parameters)
            self._check_num_choices(len(prompts), parameters.num_choices)
        except RequestError as error:
            self._metrics.call_rejected(route, error.code)
            raise
        requests = self._requests(prompts, parameters, caller_of(scope, raw))
        choices = [
            Choice(
                index,
                self._tokenizer,
                parameters,
                counts_prompt=index % parameters.num_choices == 0,
                continues=kind is CompletionBody,
            )
            for index in range(len(requests))
        ]
        call = Call(
            route=route,
            request_id=request_id,
            backend=self._backend,
            metrics=self._metrics,
            style=make_style(body, parameters, prompts),
            streaming=parameters.stream,
            include_usage=parameters.include_usage,
            receive=receive,
            send=send,
            connection=scope.get(CONNECTION),
            arrived=arrived,
        )
        self.ledger.note(request_id, tuple(request.id for request in requests))
        self.open_calls.add(call)
        self._metrics.calls_open.set(len(self.open_calls))
        try:
            await call.run(requests, choices, sum(len(prompt.tokens) for prompt in prompts))
        finally:
            self.open_calls.discard(call)
            self._metrics.calls_open.set(len(self.open_calls))

    def _requests(self, prompts: Sequence[PromptTokens], parameters: Parameters, caller: int) -> list[Request]:
        """One control-plane request per choice. The n choices of a prompt differ in their seeds alone."""
        base = parameters.seed
        if base is None:
            base = call_seed(self._seed, self._num_calls)
            self._num_calls += 1
        replace = msgspec.structs.replace
        sampled = [replace(parameters.sampling, seed=choice_seed(base, i)) for i in range(parameters.num_choices)]
        return [
            Request(
                id=self._backend.next_request_id(),
                num_prompt_tokens=len(prompt.tokens),
                max_tokens=prompt.max_tokens,
                sampling=sampling,
                prompt=prompt.tokens,
                block_keys=prompt.keys,
                deadline_seconds=self._server.request_timeout_seconds,
                caller=caller,
            )
            for prompt in prompts
            for sampling in sampled
        ]

    def _check_num_choices(self, num_prompts: int, num_choices: int) -> None:
        most = max(1, self._server.max_waiting)
        if num_prompts * num_choices > most:
            raise RequestError(
                f"{num_prompts} prompts times n = {num_choices} are {num_prompts * num_choices} choices; one call may"
                f" ask for at most {most}",
                param="n" if num_choices > 1 else "prompt",
                code="too_many_choices",
            )


def caller_of(scope: Scope, body: bytes) -> int:
    """A number for who asks what: a client that is refused and comes back sends the same bytes with the same key from
    the same address. Never 0."""
    digest = xxhash.xxh3_64(body)
    digest.update(repr((scope.get("client") or ("",))[0]).encode())
    digest.update(next((value for name, value in scope["headers"] if name == b"authorization"), b""))
    return (digest.intdigest() >> 1) | 1


def check_model(backend: Backend, name: str | None) -> None:
    """Refuse any model but the served one. `default`, or saying nothing, means it."""
    if name is not None and name not in ("default", backend.model.name):
        raise RequestError(
            f"model {name[:80]!r} does not exist here; this server has {backend.model.name!r} (or 'default')",
            status=404,
            param="model",
            code="model_not_found",
        )
