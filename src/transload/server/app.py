"""The front end as one ASGI app: request ids, API keys, dispatch, and errors in one form.

The two hot routes are plain ASGI functions; everything else goes through Starlette. Makes no tokens and runs no server.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
from collections.abc import MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from transload.deploy.spec import Server
from transload.errors import RequestError
from transload.runtime.base import Backend
from transload.server.bodies import BodyLimits, BodyReader, CallerGone, Receive, Scope, Send
from transload.server.call import send_json
from transload.server.faults import error_body, error_headers, internal_error
from transload.server.generation import Generation
from transload.server.metrics import Metrics
from transload.server.prompts import Prompts
from transload.server.routes import Routes
from transload.server.tokens import Tokenizer

logger = logging.getLogger("transload.server")

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_OPEN_PATHS = ("/health", "/ready")


class App:
    """The ASGI app. `metrics` may be fed by the runtime too."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        server: Server,
        seed: int,
        metrics: Metrics,
        body_limits: BodyLimits,
    ) -> None:
        self.metrics = metrics
        self._keys = tuple(key.encode() for key in server.api_keys)
        self._prompts = Prompts(backend.model, tokenizer)
        bodies = BodyReader(body_limits)
        self._generation = Generation(backend, tokenizer, self._prompts, server, bodies, seed, metrics)
        self._hot = {
            "/v1/chat/completions": self._generation.chat,
            "/v1/completions": self._generation.completion,
        }
        routes = Routes(backend, tokenizer, self._prompts, bodies, metrics, self._generation.ledger)
        self._starlette = Starlette(
            routes=routes.routes(),
            exception_handlers={RequestError: _refusal, HTTPException: _refusal, Exception: _crash},
        )
        self._starlette.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._starlette(scope, receive, send)
            return
        request_id = scope["transload.request_id"] = _request_id(scope)
        started = False

        async def note_start(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            path: str = scope["path"]
            self._authorize(scope, path)
            hot = self._hot.get(path)
            if hot is None:
                await self._starlette(scope, receive, note_start)
            elif scope["method"] == "POST":
                await hot(scope, receive, send, request_id)
            else:
                wrong = RequestError(f"{path} takes POST, not {scope['method']}", status=405, code="method_not_allowed")
                await send_json(send, 405, error_body(wrong), request_id, [(b"allow", b"POST")])
        except RequestError as error:
            await send_json(send, error.status, error_body(error), request_id, error_headers(error))
        except CallerGone:
            pass
        except Exception:
            if not started:  # otherwise `_crash` has said so already
                logger.exception("call %s failed", request_id)
                await send_json(send, 500, error_body(internal_error(request_id)), request_id)

    def interrupt_all(self, error: RequestError) -> None:
        """End every running call with an error that its caller gets to see."""
        for call in list(self._generation.open_calls):
            call.interrupt(error)

    def close(self) -> None:
        """Free the threads."""
        self._prompts.close()

    def _authorize(self, scope: Scope, path: str) -> None:
        """Let callers with a key in. Every key is compared, in constant time: nothing leaks from how long it takes."""
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        scope["transload.authorized"] = any(matches) or not self._keys
        if not scope["transload.authorized"] and path not in _OPEN_PATHS:
            what = "the API key is not valid" if given else "an API key is needed"
            raise RequestError(f"{what}; send Authorization: Bearer KEY", status=401, code="invalid_api_key")


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    server: Server,
    seed: int,
    *,
    metrics: Metrics | None = None,
    bodies: BodyLimits | None = None,
) -> App:
    """The OpenAI-compatible front end of `backend`. `seed` seeds the calls that bring no seed of their own."""
    limits = bodies or BodyLimits(max_bytes=server.max_body_bytes)
    return App(backend, tokenizer, server, seed, metrics or Metrics(), limits)


def _request_id(scope: Scope) -> str:
    """The caller's own id if it is short and printable, a random one otherwise."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return os.urandom(16).hex()


async def _crash(request: HttpRequest, error: Exception) -> Response:
    """A bug of ours on a slow path."""
    request_id = request.scope["transload.request_id"]
    logger.error("call %s failed", request_id, exc_info=error)
    return Response(error_body(internal_error(request_id)), status_code=500, media_type="application/json")


def _refusal(request: HttpRequest, error: Exception) -> Response:
    """Starlette's and our refusals, in OpenAI's form."""
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        text = f"{error.detail}: {request.method} {request.url.path[:200]}"
        headers = dict(error.headers or {})
        error = RequestError(text, status=error.status_code, code=code)
    else:
        assert isinstance(error, RequestError)
        headers = {}
    headers.update((name.decode(), value.decode()) for name, value in error_headers(error))
    return Response(error_body(error), status_code=error.status, headers=headers, media_type="application/json")
