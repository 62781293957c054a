"""Deployment x machine x model to a plan for each worker: device, cores, memory, blocks, links.

Pure arithmetic: reads nothing, starts nothing. What does not fit is a problem with a name and a way out, never a guess.
"""

from __future__ import annotations

import math
from collections import Counter

import msgspec

from transload.arch import DTYPE_BYTES, ModelArch
from transload.control.expert_map import build_expert_map, num_experts_by_layer
from transload.deploy.cores import Cores, assign_cores
from transload.deploy.machine import Gpu, Machine
from transload.deploy.plan import LONG_SPIN_SECONDS, ComputeDtype, FfnShare, HopPlan, LinkPlan, Placement, WorkerPlan
from transload.deploy.spec import Deployment, FfnSplit, Link, Pool, Transport
from transload.errors import DeploymentError
from transload.units import format_bytes

__all__ = ["LinkPlan", "Placement", "WorkerPlan", "place", "plan_placement", "resolve_dtype"]

FRAMES_PER_CHUNK = 6
"""About how many frames a chunk's KV is cut into, so that sending overlaps computing."""
PROCESS_BYTES = 448 * 2**20
"""Estimate of a worker without weights and cache. Measured with a step: 430 MiB in bfloat16, 470 MiB in float32."""
DEFAULT_CONTEXTS = 4
"""Contexts of full length that a KV cache has room for if the file says nothing."""
DEFAULT_SHARE = 0.2
"""Most of a device's memory that such a cache takes."""
DEFAULT_FREE_SHARE = 0.8
"""Most of the memory that is free now that all such caches of a device take together with their workers."""
KERNEL_LANES = 16
"""Our CPU kernels take sizes that are multiples of their vectors, of at most so many numbers."""
LEAST_CONTEXT = 64
"""Tokens without which a worker is of no use (or the model's own limit, if that is less)."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """A place that workers take memory from: the host, or one GPU."""

    name: str
    total_bytes: int
    free_bytes: int


def place(deployment: Deployment, machine: Machine, arch: ModelArch) -> Placement:
    """A placement that fits. Raises `DeploymentError` naming pool, needed, available and what to change."""
    placement = plan_placement(deployment, machine, arch)
    if placement.problems:
        raise DeploymentError("\n".join(placement.problems))
    return placement


def plan_placement(deployment: Deployment, machine: Machine, arch: ModelArch) -> Placement:
    """A placement with all that is wrong with it in `problems`. Never raises."""
    return _Planner(deployment, machine, arch).placement()


def resolve_dtype(deployment: Deployment, machine: Machine, arch: ModelArch) -> ComputeDtype:
    """auto is bfloat16 if every device that is used computes in it, or reads it with our own kernels, which halves a
    decode step. One for all: caches cross between workers. Of quantized it is what is not kept as stored."""
    if deployment.model.dtype != "auto":
        return "bfloat16" if deployment.model.dtype == "quantized" else deployment.model.dtype
    on_cpu = machine.has_bfloat16 or (machine.has_kernels and _takes_kernels(deployment, arch))
    for pool in deployment.pools:
        gpus = _gpus_of(pool, machine)
        native = all(gpu.has_bfloat16 for gpu in gpus) and bool(gpus) if pool.device != "cpu" else on_cpu
        if not native:
            return "float32"
    return "bfloat16"


def _takes_kernels(deployment: Deployment, arch: ModelArch) -> bool:
    """Whether whole steps go through our own CPU kernels; what does not is emulated, slower than float32."""
    sizes = (arch.hidden_size, arch.intermediate_size, arch.head_dim, arch.vocab_size)
    split = any(pool.ffn is not None or pool.role == "ffn" for pool in deployment.pools)
    plain = arch.experts is None and not arch.sinks and not deployment.model.deterministic
    return plain and not split and all(size % KERNEL_LANES == 0 for size in sizes)


def loaded_weights_bytes(arch: ModelArch, dtype: str, pool: Pool, device: str, num_parts: int = 1) -> int:
    """Estimate of what the weights of a pool's worker take once loaded: the whole model, its attention side, or one of
    `num_parts` parts of its feed-forwards. On CPU a tied output head is packed, which makes it a copy."""
    if pool.role == "ffn":
        return math.ceil(arch.num_ffn_parameters() / num_parts) * DTYPE_BYTES[dtype]
    num_weights = arch.num_parameters() - (arch.num_ffn_parameters() if pool.ffn is not None else 0)
    if device == "cpu" and arch.tied_embeddings:
        num_weights += arch.vocab_size * arch.hidden_size
    return num_weights * DTYPE_BYTES[dtype]


def workspace_bytes(arch: ModelArch, pool: Pool, dtype: str) -> int:
    """Estimate of a step's intermediate results: rows of hidden state, FFN and queries, and float32 logits."""
    row = 4 * arch.hidden_size + arch.ffn_elements_per_row() + 2 * arch.num_heads * arch.head_dim
    rows = max(pool.limits.step_tokens, pool.limits.max_batch)
    if pool.role == "ffn":
        return rows * (2 * arch.hidden_size + arch.ffn_elements_per_row()) * max(4, DTYPE_BYTES[dtype])
    return rows * row * max(4, DTYPE_BYTES[dtype]) + 2 * pool.limits.max_batch * arch.vocab_size * 4


def rows_of_a_step(pool: Pool) -> int:
    """Most rows that a worker of the pool computes in one step."""
    return max(pool.limits.step_tokens, pool.block_size) + pool.limits.max_batch


def slots_per_row(arch: ModelArch) -> int:
    """How many pieces of a layer a row goes through: the chosen experts of a mixture."""
    return arch.experts.per_token if arch.experts is not None else 1


def num_replicas(arch: ModelArch, split: FfnSplit, num_workers: int) -> int:
    """Copies of experts in each layer, beside one of each."""
    if arch.experts is None:
        return 0
    return arch.experts.num_experts * (num_workers - 1) if split.split == "replica" else split.replicas


def _most_expert_weights(arch: ModelArch, ffn: Pool, split: FfnSplit) -> int:
    """Weights of the FFN worker that has most of a mixture."""
    placed = build_expert_map(
        num_experts_by_layer(arch), ffn.workers, num_replicas=num_replicas(arch, split, ffn.workers)
    )
    sparse = [layer for layer in range(arch.num_layers) if arch.is_sparse(layer)]
    most = max(sum(len(placed.experts_of(worker, layer)) for layer in sparse) for worker in range(ffn.workers))
    all_experts = len(sparse) * (arch.experts.num_experts if arch.experts is not None else 0)
    plain = arch.num_ffn_parameters() - all_experts * arch.num_expert_parameters()
    return plain + most * arch.num_expert_parameters()


def _gpus_of(pool: Pool, machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs that a pool's workers may be on."""
    if pool.device == "cuda":
        return machine.gpus
    return tuple(gpu for gpu in machine.gpus if pool.device == f"cuda:{gpu.index}")


class _Planner:
    """Collects the parts of one placement."""

    def __init__(self, deployment: Deployment, machine: Machine, arch: ModelArch) -> None:
        self.deployment = deployment
        self.machine = machine
        self.arch = arch
        self.dtype = resolve_dtype(deployment, machine, arch)
        self.warnings: list[str] = []
        self.problems: list[str] = []
        self.wanted_context = deployment.model.max_context or arch.max_position
        self.memories = {"cpu": self._host_memory()} | {
            f"cuda:{gpu.index}": Memory(
                name=f"GPU {gpu.index} ({gpu.name})", total_bytes=gpu.memory_bytes, free_bytes=gpu.free_bytes
            )
            for gpu in machine.gpus
        }

    def _host_memory(self) -> Memory:
        return Memory(name="this machine", total_bytes=self.machine.memory_bytes, free_bytes=self.machine.free_bytes)

    def placement(self) -> Placement:
        if self.wanted_context > self.arch.max_position:
            self.problems.append(
                f"model.max_context = {self.wanted_context}: {self.arch.name} was made for {self.arch.max_position} "
                "tokens at most; lower it or leave it out"
            )
            self.wanted_context = self.arch.max_position
        devices = [self._devices(pool, index) for index, pool in enumerate(self.deployment.pools)]
        cores, warnings, problems = assign_cores(self.deployment.pools, self.machine.cores)
        self.warnings += warnings
        self.problems += problems
        self._check_quota()
        links, hops = self._links(), self._hops()
        caches = self._caches(devices)
        max_context = self._max_context(caches)
        used = Counter(core for pool_cores in cores for worker_cores in pool_cores for core in worker_cores)
        alone = {core for core, times in used.items() if times == 1}
        workers = [
            self._worker(pool, index, devices[p][index], cores[p][index], caches[p], max_context, links, hops)
            for p, pool in enumerate(self.deployment.pools)
            for index in range(pool.workers)
        ]
        workers = [
            msgspec.structs.replace(worker, spin_seconds=LONG_SPIN_SECONDS)
            if worker.cores and alone.issuperset(worker.cores)
            else worker
            for worker in workers
        ]
        self._check_memory(workers)
        return Placement(
            deployment=self.deployment,
            machine=self.machine,
            dtype=self.dtype,
            max_context=max_context,
            workers=tuple(workers),
            links=links,
            hops=hops,
            warnings=tuple(self.warnings),
            problems=tuple(self.problems),
        )

    def _worker(
        self,
        pool: Pool,
        index: int,
        device: str,
        cores: Cores,
        num_blocks: int,
        max_context: int,
        links: tuple[LinkPlan, ...],
        hops: tuple[HopPlan, ...],
    ) -> WorkerPlan:
        share = self._share(pool, index, hops)
        return WorkerPlan(
            name=f"{pool.name}-{index}",
            pool=pool.name,
            role=pool.role,
            device=device,
            starts_here=pool.start == "here",
            threads=pool.threads,
            cores=cores,
            model=self.deployment.model,
            dtype=self.dtype,
            max_context=max_context,
            block_size=pool.block_size,
            num_blocks=num_blocks,
            kv_bytes=num_blocks * self._block_bytes(pool),
            weights_bytes=self._weights_bytes(pool, device),
            limits=pool.limits,
            links=tuple(link for link in links if pool.name in (link.source, link.target)),
            seed=self.deployment.seed,
            hop=next((hop for hop in hops if hop.source == pool.name), None),
            share=share,
        )

    def _weights_bytes(self, pool: Pool, device: str) -> int:
        splits = [user.ffn for user in self.deployment.pools if user.ffn is not None and user.ffn.pool == pool.name]
        if splits and self.arch.experts is not None:
            return _most_expert_weights(self.arch, pool, splits[0]) * DTYPE_BYTES[self.dtype]
        num_parts = 1 if all(split.split == "replica" for split in splits) else pool.workers
        return loaded_weights_bytes(self.arch, self.dtype, pool, device, num_parts)

    # -- feed-forwards elsewhere ---------------------------------------------------------------------------------------

    def _hops(self) -> tuple[HopPlan, ...]:
        pools = {pool.name: pool for pool in self.deployment.pools}
        listed = {frozenset(link.between): link for link in self.deployment.links}
        hops: list[HopPlan] = []
        for index, pool in enumerate(self.deployment.pools):
            if pool.ffn is None:
                continue
            link = listed.get(frozenset((pool.name, pool.ffn.pool)))
            transport = self._transport(pool, pools[pool.ffn.pool], link)
            if transport == "direct":
                transport = "shm"  # activations are no blocks: a slot of shared memory is what they cross in
            hops.append(
                HopPlan(
                    source=pool.name,
                    target=pool.ffn.pool,
                    transport=transport,
                    split=pool.ffn,
                    num_workers=pools[pool.ffn.pool].workers,
                    max_rows=rows_of_a_step(pool),
                )
            )
            self._check_split(pool.ffn, pools[pool.ffn.pool], index)
        return tuple(hops)

    def _check_split(self, split: FfnSplit, ffn: Pool, index: int) -> None:
        """Whether the model can be cut this way into so many parts."""
        path = f"pools[{index}].ffn.split"
        experts = self.arch.experts
        if split.split == "column" and experts is not None:
            self.problems.append(
                f'{path} = "column": {self.arch.name} is a mixture of experts, whose parts are experts; use expert, or '
                "replica for all of them on each worker"
            )
            return
        if split.split == "expert" and experts is not None and ffn.workers > experts.num_experts + split.replicas:
            self.problems.append(
                f'{path} = "expert": {ffn.workers} workers for {experts.num_experts} experts: some would have nothing '
                f"to do; lower pools.{ffn.name}.workers or raise replicas"
            )
        if split.split == "expert" and experts is None:
            self.problems.append(f'{path} = "expert": {self.arch.name} has no experts; use replica or column')
        if split.split == "column" and self.arch.intermediate_size % ffn.workers:
            self.problems.append(
                f'{path} = "column": {ffn.workers} workers cannot have equal slices of {self.arch.intermediate_size} '
                f"columns; change pools.{ffn.name}.workers"
            )

    def _share(self, pool: Pool, index: int, hops: tuple[HopPlan, ...]) -> FfnShare | None:
        users = [hop for hop in hops if hop.target == pool.name]
        if not users:
            return None
        pools = {other.name: other for other in self.deployment.pools}
        is_replica = users[0].split.split == "replica"
        return FfnShare(
            split=users[0].split.split,
            part=0 if is_replica and self.arch.experts is None else index,
            num_parts=1 if is_replica and self.arch.experts is None else pool.workers,
            num_replicas=num_replicas(self.arch, users[0].split, pool.workers),
            max_wait_seconds=min(hop.split.max_wait_seconds for hop in users),
            max_rows=max(rows_of_a_step(pools[hop.source]) for hop in users) * slots_per_row(self.arch),
        )

    # -- devices -------------------------------------------------------------------------------------------------------

    def _devices(self, pool: Pool, index: int) -> list[str]:
        """The device of each worker; `cuda` spreads them over all GPUs."""
        if pool.start == "elsewhere":
            self.warnings.append(f'pool "{pool.name}" starts elsewhere: whether it fits there is not checked here')
            return [pool.device] * pool.workers
        if pool.device == "cpu":
            return ["cpu"] * pool.workers
        gpus = _gpus_of(pool, self.machine)
        if not gpus:
            there_are = ", ".join(f"cuda:{gpu.index}" for gpu in self.machine.gpus) or "none"
            self.problems.append(
                f'pool "{pool.name}": pools[{index}].device = "{pool.device}": no such GPU here; GPUs: {there_are}; '
                f"use cpu (--set pools.{pool.name}.device=cpu) or run `transload doctor`"
            )
            return [pool.device] * pool.workers
        return [f"cuda:{gpus[worker % len(gpus)].index}" for worker in range(pool.workers)]

    def _check_quota(self) -> None:
        quota = self.machine.core_quota
        here = [pool for pool in self.deployment.pools if pool.start == "here"]
        threads = sum(pool.workers * pool.threads for pool in here)
        if quota is not None and threads > quota:
            self.warnings.append(
                f"a container limit leaves {quota:g} cores' worth of time for {threads} threads: they will be stopped "
                "and started; use fewer, or raise the limit"
            )

    # -- links ---------------------------------------------------------------------------------------------------------

    def _links(self) -> tuple[LinkPlan, ...]:
        listed = {frozenset(link.between): link for link in self.deployment.links}
        pools = self.deployment.pools
        return tuple(
            self._link(source, target, listed.get(frozenset((source.name, target.name))))
            for source in pools
            if source.role == "prefill"
            for target in pools
            if target.role == "decode"
        )

    def _link(self, source: Pool, target: Pool, listed: Link | None) -> LinkPlan:
        link = listed or Link(between=(source.name, target.name))
        transport = self._transport(source, target, link)
        layers = link.layers_per_frame or math.ceil(self.arch.num_layers / FRAMES_PER_CHUNK)
        return LinkPlan(
            source=source.name,
            target=target.name,
            transport=transport,
            layers_per_frame=min(layers, self.arch.num_layers),
            window_frames=link.window_frames,
            lease_seconds=link.lease_seconds,
        )

    def _transport(self, source: Pool, target: Pool, link: Link | None) -> Transport:
        on_cpu = source.device == target.device == "cpu"
        here = source.start == target.start == "here"
        transport: Transport = link.transport if link is not None else "auto"
        if here and transport == "auto":
            return "direct" if self.machine.has_memfd and on_cpu else "tcp"
        pair = f'link between "{source.name}" and "{target.name}"'
        if here and transport in ("direct", "shm") and not self.machine.has_memfd:
            self.problems.append(f"{pair}: {transport} needs Linux; set its transport to tcp")
        elif transport == "direct" and not on_cpu:
            self.problems.append(f"{pair}: direct needs both pools on device cpu; set its transport to shm")
        return transport

    # -- memory --------------------------------------------------------------------------------------------------------

    def _block_bytes(self, pool: Pool) -> int:
        return pool.block_size * self.arch.kv_bytes_per_token(self.dtype)

    def _beside_cache(self, pool: Pool, device: str) -> int:
        """Estimate of what a worker needs of its device's memory beside its KV cache."""
        weights = self._weights_bytes(pool, device)
        return PROCESS_BYTES + weights + workspace_bytes(self.arch, pool, self.dtype)

    def _caches(self, devices: list[list[str]]) -> list[int]:
        """Blocks of each worker, by pool."""
        caches: list[int] = []
        for index, pool in enumerate(self.deployment.pools):
            block_bytes = self._block_bytes(pool)
            if pool.role == "ffn":
                caches.append(0)
                continue
            if pool.memory_bytes is not None:
                caches.append(max(1, pool.memory_bytes // block_bytes))
                if pool.memory_bytes < block_bytes:
                    self.problems.append(
                        f'pool "{pool.name}": pools[{index}].memory = {format_bytes(pool.memory_bytes)} holds no KV '
                        f"block; one of {pool.block_size} tokens takes {format_bytes(block_bytes)} in {self.dtype}; "
                        f"raise pools.{pool.name}.memory"
                    )
                continue
            contexts = DEFAULT_CONTEXTS * math.ceil(self.wanted_context / pool.block_size)
            if pool.start == "elsewhere":
                caches.append(contexts)
                continue
            share = min(self._fair_share(device, devices) for device in set(devices[index]))
            least = math.ceil(min(LEAST_CONTEXT, self.wanted_context) / pool.block_size)
            caches.append(max(least, min(contexts, share // block_bytes)))
        return caches

    def _fair_share(self, device: str, devices: list[list[str]]) -> int:
        """Bytes that the cache of each worker with no size of its own may take on a device."""
        memory = self.memories.get(device)
        if memory is None:
            return 0  # no such device: a problem already
        free = memory.free_bytes * DEFAULT_FREE_SHARE
        num_sharing = 0
        for pool, places in zip(self.deployment.pools, devices, strict=True):
            num_here = places.count(device) if pool.start == "here" else 0
            free -= num_here * (self._beside_cache(pool, device) + (pool.memory_bytes or 0))
            num_sharing += num_here if pool.memory_bytes is None and pool.role != "ffn" else 0
        return int(max(0.0, min(memory.total_bytes * DEFAULT_SHARE, free / max(1, num_sharing))))

    def _max_context(self, caches: list[int]) -> int:
        """What every worker can hold, or the limit if that is less."""
        kept = [index for index, pool in enumerate(self.deployment.pools) if pool.role != "ffn"]
        pools, caches = [self.deployment.pools[index] for index in kept], [caches[index] for index in kept]
        held = [num_blocks * pool.block_size for pool, num_blocks in zip(pools, caches, strict=True)]
        smallest = min(range(len(pools)), key=lambda index: held[index])
        if held[smallest] >= self.wanted_context:
            return self.wanted_context
        pool = pools[smallest]
        has = format_bytes(caches[smallest] * self._block_bytes(pool))
        needed = math.ceil(self.wanted_context / pool.block_size) * self._block_bytes(pool)
        told = self.deployment.model.max_context is not None
        limit = (
            f"model.max_context = {self.wanted_context}" if told else f"the model's context of {self.wanted_context}"
        )
        raise_it = f"set pools.{pool.name}.memory to {format_bytes(needed)} or more"
        text = f'pool "{pool.name}": {limit} needs a KV cache of {format_bytes(needed)}, each worker has {has}'
        if self.problems:
            return held[smallest]
        if told or held[smallest] < min(LEAST_CONTEXT, self.arch.max_position):
            lower = f", or lower model.max_context to {held[smallest]}" if told else ""
            self.problems.append(f"{text}, which holds {held[smallest]} tokens; {raise_it}{lower}")
        else:
            self.warnings.append(f"{text}: requests are limited to {held[smallest]} tokens; {raise_it} for longer ones")
        return held[smallest]

    def _check_memory(self, workers: list[WorkerPlan]) -> None:
        """Each device's memory against what all its workers need together."""
        pools = {pool.name: pool for pool in self.deployment.pools}
        for device, memory in self.memories.items():
            here = [worker for worker in workers if worker.device == device and worker.starts_here]
            needs = {w.name: w.kv_bytes + self._beside_cache(pools[w.pool], device) for w in here}
            needed = sum(needs.values())
            if needed <= memory.free_bytes:
                continue
            by_pool = {
                pool.name: sum(needs[worker.name] for worker in here if worker.pool == pool.name)
                for pool in self.deployment.pools
            }
            largest = max(by_pool, key=lambda name: by_pool[name])
            worker = next(worker for worker in here if worker.pool == largest)
            count = sum(other.pool == largest for other in here)
            beside = format_bytes(self._beside_cache(pools[largest], device))
            knobs = [f"pools.{largest}.memory"] if pools[largest].memory_bytes is not None else []
            knobs += [f"pools.{largest}.workers"] if count > 1 else []
            way_out = (
                f"lower {' or '.join(knobs)}" if knobs else "free some memory, or take a smaller model or topology"
            )
            self.problems.append(
                f'pool "{largest}": {count} worker{"s need" if count > 1 else " needs"} '
                f"{format_bytes(by_pool[largest])} (each {format_bytes(worker.kv_bytes)} KV cache and about {beside} "
                f"for weights and the process), all pools {format_bytes(needed)}; {format_bytes(memory.free_bytes)} of "
                f"{format_bytes(memory.total_bytes)} are free on {memory.name}; {way_out}"
            )
