"""Errors as callers see them: OpenAI's error object, its HTTP status and headers. Decides nothing else."""

from __future__ import annotations

import math

import msgspec

from transload.errors import OverCapacity, RequestError

INTERNAL = "internal_error"
_TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}
_STATUS_OF_CODE = {"deadline_exceeded": 504, "worker_lost": 503, "handoff_failed": 503, "shutting_down": 503}


def internal_error(request_id: str) -> RequestError:
    """For a bug of ours: says nothing of the inside, but names what to look for in the log."""
    return RequestError(f"internal error; the server's log has more under {request_id}", status=500, code=INTERNAL)


def failed_request(message: str | None, code: str | None) -> RequestError:
    """For a request that was admitted and ended in an error."""
    status = _STATUS_OF_CODE.get(code or "", 500)
    return RequestError(message or "the request failed", status=status, code=code or INTERNAL)


def error_body(error: RequestError) -> bytes:
    """OpenAI's error object."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    )


def error_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    """Headers that go with an error, besides content type and length."""
    if isinstance(error, OverCapacity):
        return [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_seconds)))]
    if error.status == 401:
        return [(b"www-authenticate", b"Bearer")]
    if error.status == 408:  # the rest of the body is not coming
        return [(b"connection", b"close")]
    return []
