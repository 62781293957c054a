"""A placement in numbers a person can check: what runs where, what it takes, what crosses which link.

Computes only; `show.py` prints. Every number that nobody measured here is called an estimate.
"""

from __future__ import annotations

import math

import msgspec

from transload.arch import DTYPE_BYTES, ModelArch
from transload.control.ffn_messages import Split
from transload.deploy.placement import PROCESS_BYTES, workspace_bytes
from transload.deploy.plan import ComputeDtype, HopPlan, LinkPlan, Placement, WorkerPlan
from transload.deploy.spec import PoolRole, Router, Targets, Transport

SHM_BYTES_PER_SECOND = 10e9
TCP_BYTES_PER_SECOND = 3e9
"""Estimates for one ordinary host: a copy between mapped pools, and one TCP stream over loopback."""
PROMPT_TOKENS = 1000
"""Length of the prompt that the examples speak of."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the model without loading it."""

    name: str
    arch: ModelArch
    stored_dtype: str | None = None
    """None: the weights are not here yet."""
    stored_bytes: int | None = None


class ModelLine(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    family: str
    num_parameters: int
    num_active_parameters: int
    """Weights that one token is multiplied with."""
    num_experts: int | None
    """In each mixture; None: the model has none."""
    experts_per_token: int | None
    num_layers: int
    stored_dtype: str | None
    stored_bytes: int | None
    dtype: ComputeDtype
    deterministic: bool
    max_context: int
    kv_bytes_per_token: int


class MachineLine(msgspec.Struct, frozen=True, kw_only=True):
    cores: tuple[int, ...]
    core_quota: float | None
    memory_bytes: int
    free_bytes: int
    gpus: tuple[str, ...]


class WorkerLine(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: PoolRole
    starts_here: bool
    device: str
    threads: int
    cores: tuple[int, ...]
    weights_bytes: int
    kv_bytes: int
    other_bytes: int
    """Estimate: process and a step's intermediate results."""
    num_blocks: int
    block_size: int
    kv_tokens: int
    full_contexts: float
    """Requests of the longest context that the cache holds at once."""
    max_batch: int
    step_tokens: int


class LinkLine(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    target: str
    crosses: str
    transport: Transport
    bytes_per_token: int
    """For each prompt token that the target does not have cached."""
    bytes_per_prompt: int
    """For a prompt of 1,000 tokens; whole blocks cross."""
    frames_per_prompt: int
    shm_seconds: float
    """Estimate for that prompt, if nothing overlapped."""
    tcp_seconds: float


class HopLine(msgspec.Struct, frozen=True, kw_only=True):
    """Activations between an attention pool and the pool that computes its feed-forwards."""

    source: str
    target: str
    transport: Transport
    split: Split
    micro_batches: int
    bytes_per_row: int
    """There and back, for one token in one layer."""
    bytes_per_token: int
    """The same through all layers: what each token that is computed costs on this link."""
    calls_per_step: int
    fallback: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `transload explain` says."""

    source: str
    """The file or the shorthand."""
    fits: bool
    model: ModelLine
    machine: MachineLine
    workers: tuple[WorkerLine, ...]
    links: tuple[LinkLine, ...]
    hops: tuple[HopLine, ...]
    targets: Targets
    router: Router
    address: str
    warnings: tuple[str, ...]
    problems: tuple[str, ...]


def explain(placement: Placement, facts: ModelFacts, source: str) -> Explanation:
    """Put a placement into numbers. `source` says where the deployment came from."""
    deployment, machine = placement.deployment, placement.machine
    return Explanation(
        source=source,
        fits=not placement.problems,
        model=_model_line(placement, facts),
        machine=MachineLine(
            cores=tuple(sorted(machine.cores)),
            core_quota=machine.core_quota,
            memory_bytes=machine.memory_bytes,
            free_bytes=machine.free_bytes,
            gpus=tuple(gpu.name for gpu in machine.gpus),
        ),
        workers=tuple(_worker_line(worker, placement, facts.arch) for worker in placement.workers),
        links=tuple(_link_line(link, placement, facts.arch) for link in placement.links),
        hops=tuple(_hop_line(hop, placement, facts.arch) for hop in placement.hops),
        targets=deployment.targets,
        router=deployment.router,
        address=f"http://{deployment.server.host}:{deployment.server.port}/v1",
        warnings=placement.warnings,
        problems=placement.problems,
    )


def _model_line(placement: Placement, facts: ModelFacts) -> ModelLine:
    experts = facts.arch.experts
    return ModelLine(
        name=facts.name,
        family=facts.arch.family,
        num_parameters=facts.arch.num_parameters(),
        num_active_parameters=facts.arch.num_active_parameters(),
        num_experts=experts.num_experts if experts is not None else None,
        experts_per_token=experts.per_token if experts is not None else None,
        num_layers=facts.arch.num_layers,
        stored_dtype=facts.stored_dtype,
        stored_bytes=facts.stored_bytes,
        dtype=placement.dtype,
        deterministic=placement.deployment.model.deterministic,
        max_context=placement.max_context,
        kv_bytes_per_token=facts.arch.kv_bytes_per_token(placement.dtype),
    )


def _worker_line(worker: WorkerPlan, placement: Placement, arch: ModelArch) -> WorkerLine:
    pool = next(pool for pool in placement.deployment.pools if pool.name == worker.pool)
    kv_tokens = worker.num_blocks * worker.block_size
    return WorkerLine(
        name=worker.name,
        role=worker.role,
        starts_here=worker.starts_here,
        device=worker.device,
        threads=worker.threads,
        cores=worker.cores,
        weights_bytes=worker.weights_bytes,
        kv_bytes=worker.kv_bytes,
        other_bytes=PROCESS_BYTES + workspace_bytes(arch, pool, placement.dtype),
        num_blocks=worker.num_blocks,
        block_size=worker.block_size,
        kv_tokens=kv_tokens,
        full_contexts=kv_tokens / placement.max_context,
        max_batch=worker.limits.max_batch,
        step_tokens=worker.limits.step_tokens,
    )


def _link_line(link: LinkPlan, placement: Placement, arch: ModelArch) -> LinkLine:
    pool = next(pool for pool in placement.deployment.pools if pool.name == link.source)
    bytes_per_token = arch.kv_bytes_per_token(placement.dtype)
    num_bytes = math.ceil(PROMPT_TOKENS / pool.block_size) * pool.block_size * bytes_per_token
    num_chunks = math.ceil(PROMPT_TOKENS / max(pool.limits.step_tokens, pool.block_size))
    is_direct = link.transport == "direct"
    return LinkLine(
        source=link.source,
        target=link.target,
        crosses=(
            "KV cache of the prompt, written where decode reads it while it is computed"
            if is_direct
            else "KV cache of the prompt, once a request, layer by layer while it is computed"
        ),
        transport=link.transport,
        bytes_per_token=bytes_per_token,
        bytes_per_prompt=num_bytes,
        frames_per_prompt=1 if is_direct else num_chunks * math.ceil(arch.num_layers / link.layers_per_frame),
        shm_seconds=num_bytes / SHM_BYTES_PER_SECOND,
        tcp_seconds=num_bytes / TCP_BYTES_PER_SECOND,
    )


def _hop_line(hop: HopPlan, placement: Placement, arch: ModelArch) -> HopLine:
    pools = {pool.name: pool for pool in placement.deployment.pools}
    num_copies = pools[hop.target].workers if hop.split.split == "column" else 1
    num_crossings = 2 * num_copies
    if arch.experts is not None:  # there once for each worker that has one of its experts, back once for each expert
        num_copies = min(arch.experts.per_token, pools[hop.target].workers)
        num_crossings = num_copies + arch.experts.per_token
    row_bytes = num_crossings * arch.hidden_size * DTYPE_BYTES[placement.dtype]
    return HopLine(
        source=hop.source,
        target=hop.target,
        transport=hop.transport,
        split=hop.split.split,
        micro_batches=hop.split.micro_batches,
        bytes_per_row=row_bytes,
        bytes_per_token=row_bytes * arch.num_layers,
        calls_per_step=hop.split.micro_batches * num_copies * arch.num_layers,
        fallback=hop.split.fallback,
    )
