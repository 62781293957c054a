"""What the cluster's machine is told once, before anything happens. Data only."""

from __future__ import annotations

import msgspec

from transload.control.router import LocalPrefill, Policy


class ControllerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller is told once."""

    policy: Policy = "estimate"
    local_prefill: LocalPrefill = "auto"
    max_attempts: int = 4
    """How often a request is taken up by workers; one that was sent to a worker already dead does not count."""
    max_waiting: int = 256
    ttft_seconds: float | None = None
    """If set: a request is let in only if it should have its first token within this."""
    tpot_seconds: float | None = None
    """If set: no decode worker gets more requests than it makes tokens for within this."""
    first_restart_seconds: float = 0.2
    """Pause before a lost worker is started again; doubles with every loss that follows within a minute."""
    longest_restart_seconds: float = 10.0
    keep_ended: int = 1024
    """Ended requests whose record is kept."""
