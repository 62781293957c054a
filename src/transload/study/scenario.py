"""What goes wrong in a simulated run, in words such as `kill decode-0 at 30s`. Parses, refuses, and has it happen."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from transload.control.messages import WorkerId
from transload.errors import DeploymentError
from transload.hardware.nearest import did_you_mean
from transload.runtime.virtual import VirtualRuntime
from transload.study.ffn_workers import ffn_worker_names
from transload.study.simulated import SimulatedCluster
from transload.units import parse_seconds

WANTED = (
    '"kill WORKER at TIME", "pause WORKER at TIME for DURATION", or "link POOL:POOL at SHARE% from TIME to TIME", such '
    'as "kill decode-0 at 30s"'
)
_KILL = re.compile(r"kill (\S+) at (.+)")
_PAUSE = re.compile(r"pause (\S+) at (.+) for (.+)")
_LINK = re.compile(r"link ([^\s:]+):([^\s:]+) at ([0-9.]+) ?% from (.+) to (.+)")


class Kill(msgspec.Struct, frozen=True):
    """A worker dies, and is started again as the controller decides; one of role ffn as the front end does."""

    worker: str
    at_seconds: float


class Pause(msgspec.Struct, frozen=True):
    """A worker stands still for a while, as a stopped process does."""

    worker: str
    at_seconds: float
    seconds: float


class SlowLink(msgspec.Struct, frozen=True):
    """The wires between two pools give a share of what they should, both ways."""

    pools: tuple[str, str]
    share: float
    start_seconds: float
    end_seconds: float


Disturbance = Kill | Pause | SlowLink


def parse_fault(text: str, cluster: SimulatedCluster) -> Disturbance:
    """Raises `DeploymentError` for words that mean nothing, and for workers and pools that are not there."""
    words = " ".join(text.split())
    if (match := _KILL.fullmatch(words)) is not None:
        return Kill(_worker(match[1], text, cluster, may_be_ffn=True), _time(match[2], text))
    if (match := _PAUSE.fullmatch(words)) is not None:
        return Pause(_worker(match[1], text, cluster), _time(match[2], text), _time(match[3], text))
    if (match := _LINK.fullmatch(words)) is None:
        raise DeploymentError(f"--fault {text}: wanted {WANTED}")
    pairs = {frozenset((link.source, link.target)) for link in cluster.links}
    pools = match[1], match[2]
    if frozenset(pools) not in pairs:
        there_are = ", ".join(f"{link.source}:{link.target}" for link in cluster.links) or "none"
        raise DeploymentError(
            f"--fault {text}: no link {match[1]}:{match[2]} in this deployment; there are: {there_are}"
        )
    share, start, end = float(match[3]) / 100, _time(match[4], text), _time(match[5], text)
    if not 0 < share <= 1:
        raise DeploymentError(f"--fault {text}: a link can give from above 0 % to 100 % (kill a worker to cut it off)")
    if end <= start:
        raise DeploymentError(f"--fault {text}: it ends at {end:g} s, before it begins at {start:g} s")
    return SlowLink(pools, share, start, end)


def apply_faults(runtime: VirtualRuntime, faults: Iterable[Disturbance]) -> None:
    """Have them happen."""
    for fault in faults:
        match fault:
            case Kill(worker, at_seconds):
                runtime.kill(at_seconds, WorkerId(worker))
            case Pause(worker, at_seconds, seconds):
                runtime.pause(at_seconds, WorkerId(worker), seconds)
            case SlowLink(pools, share, start, end):
                for source, target in (pools, pools[::-1]):
                    runtime.scale_link(start, source, target, share)
                    runtime.scale_link(end, source, target, 1.0)


def _worker(name: str, text: str, cluster: SimulatedCluster, *, may_be_ffn: bool = False) -> str:
    known: list[str] = [worker for pool in cluster.pools for worker in pool.worker_names]
    ffn = ffn_worker_names([pool.spec for pool in cluster.ffn_pools])
    if name in ffn and not may_be_ffn:
        raise DeploymentError(f"--fault {text}: {name} computes feed-forwards; such a worker can be killed, not paused")
    known += ffn
    if name not in known:
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise DeploymentError(f"--fault {text}: no worker {name}{did_you_mean(name, known)}; there are: {shown}")
    return name


def _time(text: str, fault: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as problem:
        raise DeploymentError(f"--fault {fault}: {text!r} {problem}") from None
