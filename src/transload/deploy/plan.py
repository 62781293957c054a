"""What a worker is told: plain numbers, ready to be sent to its process. Made by `placement.py`, which decides them."""

from __future__ import annotations

from typing import Literal

import msgspec

from transload.control.ffn_messages import Split
from transload.control.messages import Role
from transload.deploy.machine import Machine
from transload.deploy.spec import Deployment, FfnSplit, Limits, ModelSpec, PoolRole, Transport

ComputeDtype = Literal["float32", "bfloat16"]
WireTransport = Transport
"""What a link is told to use. auto only if a worker starts elsewhere: then its peers decide when they meet."""


SHORT_SPIN_SECONDS = 50e-6
LONG_SPIN_SECONDS = 2e-3
"""On a core that no other worker uses."""


class LinkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How KV crosses from a prefill pool to a decode pool."""

    source: str
    """The prefill pool."""
    target: str
    """The decode pool."""
    transport: WireTransport
    layers_per_frame: int
    window_frames: int
    lease_seconds: float


class HopPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How activations cross between an attention pool and the pool that computes its feed-forwards."""

    source: str
    """The attention pool."""
    target: str
    """The ffn pool."""
    transport: WireTransport
    split: FfnSplit
    num_workers: int
    """Of the ffn pool."""
    max_rows: int
    """Most rows that one step of an attention worker has."""


class FfnShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one FFN worker has of every layer: its `part`-th of `num_parts`, or all of it if it is a replica.

    Of a mixture it has those experts that `build_expert_map` gives its number, whichever the split.
    """

    split: Split
    part: int
    num_parts: int
    num_replicas: int
    """Of a mixture: copies of experts beside one of each, in each layer. All of them where workers are replicas."""
    loads: tuple[tuple[int, ...], ...] | None = None
    """Of a mixture: how often each layer's experts were chosen so far; None: nobody knows."""
    max_wait_seconds: float
    max_rows: int
    """Rows of one call, at most: what an attention worker may compute in one step."""


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process. Everything it must know beside its name and whom to join."""

    name: str
    """`<pool>-<index>`."""
    pool: str
    role: PoolRole
    device: str
    """cpu or cuda:N."""
    starts_here: bool
    """Whether the server starts its process."""
    threads: int
    cores: tuple[int, ...]
    """To be pinned to; none: not pinned."""
    model: ModelSpec
    """As the deployment says it. What it leaves open is decided in `dtype` and `max_context`."""
    dtype: ComputeDtype
    """Of weights and KV cache."""
    max_context: int
    block_size: int
    num_blocks: int
    kv_bytes: int
    """Of the KV cache: whole blocks."""
    weights_bytes: int
    """Estimate of the weights in memory, which is not their size on disk."""
    limits: Limits
    links: tuple[LinkPlan, ...]
    """Those of its pool."""
    seed: int
    hop: HopPlan | None = None
    """Of an attention worker: who computes its feed-forwards. None: it does."""
    share: FfnShare | None = None
    """Of an FFN worker: what it computes."""
    spin_seconds: float = SHORT_SPIN_SECONDS
    """How long it may look for calls or answers again and again before it sleeps."""

    @property
    def duty(self) -> Role:
        """What the Controller sends it. An FFN worker has none."""
        assert self.role != "ffn", f"{self.name} is unknown to the Controller"
        return self.role

    @property
    def transports(self) -> dict[str, WireTransport]:
        """By the pool at the other end."""
        return {link.target if link.source == self.pool else link.source: link.transport for link in self.links}

    @property
    def lease_seconds(self) -> float:
        """The longest of its links' leases."""
        return max((link.lease_seconds for link in self.links), default=10.0)

    @property
    def window_frames(self) -> int:
        """The widest of its links' windows."""
        return max((link.window_frames for link in self.links), default=32)

    @property
    def layers_per_frame(self) -> int:
        """The fewest of its links' layers in a frame; 0 if it has no links."""
        return min((link.layers_per_frame for link in self.links), default=0)


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything of a deployment runs, on one machine."""

    deployment: Deployment
    machine: Machine
    dtype: ComputeDtype
    max_context: int
    """Longest prompt plus output, in tokens, that every worker can hold."""
    workers: tuple[WorkerPlan, ...]
    links: tuple[LinkPlan, ...]
    hops: tuple[HopPlan, ...]
    warnings: tuple[str, ...]
    """What will work, but not as one might expect."""
    problems: tuple[str, ...]
    """What does not fit, and what to do. Nothing can be run unless this is empty."""
