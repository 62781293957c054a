"""Every error a caller of Transload can see, in one tree.

    TransloadError
    ├── DeploymentError    the user's deployment file or flags (exit code 2)
    ├── CheckpointError    the user's model files
    ├── MachineError       this machine lacks something the deployment asks for
    ├── RequestError       the caller's request; carries an HTTP status and the field at fault
    │   └── OverCapacity   refused for now; carries the seconds after which to try again
    ├── WorkerLost         a worker process died or went silent
    └── HandoffError       a KV transfer between two workers failed

A message says what, where, got, wanted and what to do. Bugs of our own are `assert`s, never one of these.
"""

from __future__ import annotations


class TransloadError(Exception):
    """Base of every error raised on purpose."""


class DeploymentError(TransloadError):
    """A deployment file, flag or override that cannot be used as written."""


class CheckpointError(TransloadError):
    """Model files that are missing, damaged, or of a kind this project does not load."""


class MachineError(TransloadError):
    """Something the deployment needs and this machine does not have."""


class RequestError(TransloadError):
    """A request that is refused at the border.

    `status` is the HTTP status, `param` the field at fault (None: the request as a whole) and `code` the
    short machine-readable reason, as in OpenAI's error object.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code


class OverCapacity(RequestError):
    """Refused because the queue is full; worth trying again after `retry_after_seconds`."""

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message, status=429, code="over_capacity")
        self.retry_after_seconds = retry_after_seconds


class WorkerLost(TransloadError):
    """A worker process died, went silent, or could not be started."""


class HandoffError(TransloadError):
    """A KV transfer could not be set up or completed."""
