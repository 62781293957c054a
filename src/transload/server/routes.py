"""The routes that make no tokens: models, tokenizing, health, metrics, waterfalls. Slow paths, on Starlette."""

from __future__ import annotations

import time

import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from transload.errors import RequestError
from transload.runtime.base import Backend
from transload.server.bodies import BodyReader, parse_body
from transload.server.generation import Ledger, check_model
from transload.server.metrics import Metrics
from transload.server.prompts import Prompts
from transload.server.schema import DetokenizeBody, SplitBody, TokenizeBody
from transload.server.tokens import Tokenizer


class Routes:
    """Handlers that share the backend. `routes` lists them for Starlette."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        prompts: Prompts,
        bodies: BodyReader,
        metrics: Metrics,
        ledger: Ledger,
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._bodies = bodies
        self._metrics = metrics
        self._ledger = ledger
        self._created = int(time.time())

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/requests/{name:path}", self.request),
            Route("/admin/split", self.split, methods=["POST"]),
        ]

    async def models(self, _request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        check_model(self._backend, request.path_params["name"])
        return json_response(self._card())

    async def tokenize(self, request: Request) -> Response:
        """vLLM's form. Text gets the model's special tokens unless told otherwise, a conversation does not."""
        body = parse_body(await self._body(request), TokenizeBody)
        check_model(self._backend, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("send either prompt or messages", param="prompt", code="missing_field")
        if body.messages is not None:
            text = await self._prompts.render(
                body.messages, add_generation_prompt=body.add_generation_prompt is not False
            )
            special = bool(body.add_special_tokens)
        else:
            assert body.prompt is not None
            text, special = body.prompt, body.add_special_tokens is not False
        tokens = await self._prompts.tokenize(text, special=special)
        texts = [self._tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": self._backend.model.max_context, "tokens": tokens}
        return json_response({**answer, "token_strs": texts})

    async def detokenize(self, request: Request) -> Response:
        body = parse_body(await self._body(request), DetokenizeBody)
        check_model(self._backend, body.model)
        return json_response({"prompt": await self._prompts.detokenize(body.tokens)})

    async def health(self, request: Request) -> Response:
        """Open to all; what is inside is said only to callers with a key."""
        shown: dict[str, object] = {"status": "ok"}
        if request.scope.get("transload.authorized", False):
            shown.update(self._backend.status())
        return json_response(shown)

    async def ready(self, _request: Request) -> Response:
        if not self._backend.is_ready():
            raise RequestError("no token can be made yet; workers are starting", status=503, code="not_ready")
        return json_response({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._metrics.registry), headers={"content-type": content_type})

    async def request(self, request: Request) -> Response:
        """The waterfalls of all choices of a call."""
        name = request.path_params["name"]
        ids = self._ledger.look_up(name) or ()
        waterfalls = [found for found in map(self._backend.waterfall, ids) if found is not None]
        if not waterfalls:
            raise RequestError(
                f"no request {name[:80]!r}; give the x-request-id of a recent call or the id in its answer",
                status=404,
                param="id",
                code="request_not_found",
            )
        return json_response({"id": name, "object": "request", "choices": waterfalls})

    async def split(self, request: Request) -> Response:
        """Move feed-forwards to workers of their own, or back, with requests under way."""
        body = parse_body(await self._body(request), SplitBody)
        return json_response(await self._backend.change_split(body.topology))

    async def _body(self, request: Request) -> bytes:
        return await self._bodies.read(request.scope, request.receive)

    def _card(self) -> dict[str, object]:
        model = self._backend.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "transload",
            "root": model.arch.name,
            "parent": None,
            "max_model_len": model.max_context,
        }


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
