"""FFN workers of a simulated deployment that die and come back, and what that makes of their attention workers' steps.

While all are up, or some of a pool of replicas, a step is the closed form's, of as many as there are. A step during
which one goes is played with the machines that serve (`runtime/ffn_step.py`), as is each that begins with a part of
the feed-forwards at nobody. An FFN worker that another stands in for has that one's own calls beside it: they count in
how long a merged call takes there, not in how long it waits for its turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from transload.control.ffn_messages import FfnRequest
from transload.control.messages import Chunk, WorkerId
from transload.deploy.spec import Pool
from transload.hardware.afd.memory import ffn_chip_bytes
from transload.hardware.afd.pipeline import Pipeline
from transload.hardware.afd.split_cost import SplitCost
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.runtime.ffn_pools import FIRST_RESTART_SECONDS
from transload.runtime.ffn_step import FfnRules, Outage, play_step
from transload.study.result import FfnLoss
from transload.study.simulated import LOAD_BYTES_PER_SECOND, FfnPool, SimulatedCluster, SimulatedPool, step_shape
from transload.study.split_pools import attention_pools
from transload.units import format_bytes

MOST_PLAYED = 8
"""Attention workers of one cohort that are played one by one; a larger cohort is played as one that sends for all."""
MOST_SPARES = 4
"""FFN workers of others that are played as ready to stand in."""


class _Loss:
    """One death of an FFN worker."""

    def __init__(self, worker: WorkerId, at: float, back: float) -> None:
        self.worker, self.at, self.back = worker, at, back
        self.num_steps = self.num_retries = self.num_computed_here = self.num_failed_steps = 0
        self.longest_delay = 0.0


class _Group:
    """An FFN pool and those that call it."""

    def __init__(self, ffn: FfnPool, attention: list[WorkerId]) -> None:
        self.ffn, self.attention = ffn, attention
        self.names = [WorkerId(f"{ffn.spec.name}-{index}") for index in range(ffn.spec.workers)]
        self.down: dict[WorkerId, _Loss] = {}
        """The last death of each, until it is back."""

    def alive(self, at: float) -> list[WorkerId]:
        """Those that are up at a time."""
        return [name for name in self.names if not self._is_down(name, at)]

    def _is_down(self, name: WorkerId, at: float) -> bool:
        loss = self.down.get(name)
        return loss is not None and loss.at <= at < loss.back


class FfnWorkers:
    """The FFN side of a virtual run."""

    def __init__(self, cluster: SimulatedCluster, message_seconds: float) -> None:
        """`message_seconds`: until those who call a worker know that it is dead."""
        self._cluster, self._message_seconds = cluster, message_seconds
        self._pools = {name: pool for pool in cluster.pools for name in pool.worker_names if pool.spec.ffn is not None}
        self._groups: dict[str, _Group] = {}
        for ffn in cluster.ffn_pools:
            callers = [pool.name for pool in attention_pools(cluster.deployment, ffn.spec.name)]
            names = [name for caller in callers for name in cluster.pool(caller).worker_names]
            self._groups[ffn.spec.name] = _Group(ffn, names)
        self._costs: dict[tuple[str, int], SplitCost] = {}
        self._here: dict[str, WorkerCost] = {}
        self._with_weights: set[WorkerId] = set()
        self._losses: list[_Loss] = []

    @property
    def losses(self) -> tuple[FfnLoss, ...]:
        """What has happened so far."""
        return tuple(
            FfnLoss(
                worker=loss.worker,
                at_seconds=loss.at,
                back_seconds=loss.back,
                num_steps=loss.num_steps,
                longest_delay_seconds=loss.longest_delay,
                num_retries=loss.num_retries,
                num_computed_here=loss.num_computed_here,
                num_failed_steps=loss.num_failed_steps,
            )
            for loss in self._losses
        )

    def serves(self, worker: WorkerId) -> bool:
        """Whether an attention worker has its feed-forwards computed elsewhere."""
        return worker in self._pools

    def kill(self, worker: WorkerId, now: float) -> tuple[WorkerId, ...]:
        """It dies, and is started again as the front end does it. The attention workers whose steps are others now;
        none if nobody is called so, or it is dead already."""
        group = next((group for group in self._groups.values() if worker in group.names), None)
        if group is None or worker not in group.alive(now):
            return ()
        loss = _Loss(worker, now, now + FIRST_RESTART_SECONDS + self._load_seconds(group))
        group.down[worker] = loss
        self._losses.append(loss)
        return tuple(group.attention)

    def step(self, worker: WorkerId, chunks: Sequence[Chunk], began: float) -> tuple[float, str | None]:
        """Seconds of a step that began then, as far as is known by now, and why it fails."""
        pool = self._pools[worker]
        group = self._group_of(pool)
        shape = step_shape(chunks)
        away = [loss for loss in group.down.values() if loss.back > began]
        whole = pool.cost
        assert isinstance(whole, SplitCost)
        if not away:
            return whole.step_seconds(shape), None
        alive = group.alive(began)
        is_replica = whole.worker.split == "replica"
        usual = self._cost(pool, len(alive) if is_replica and alive else group.ffn.spec.workers)
        seconds = usual.step_seconds(shape)
        during = [loss for loss in away if began < loss.at < began + seconds]
        if not during and is_replica and alive:
            return seconds, None
        if not during and not alive and self._computes_here(pool):
            return self._step_here(worker, pool, shape, away), None
        return self._play(worker, pool, group, shape, began, alive, usual, during or away)

    # -- steps with a loss in them ------------------------------------------------------------------------------------

    def _play(
        self,
        worker: WorkerId,
        pool: SimulatedPool,
        group: _Group,
        shape: StepShape,
        began: float,
        alive: list[WorkerId],
        cost: SplitCost,
        losses: list[_Loss],
    ) -> tuple[float, str | None]:
        pipeline = cost.pipeline_of(shape)
        rows = math.ceil(shape.num_tokens / pipeline.micro_batches)
        is_replica = pipeline.split == "replica"
        names = (alive or group.names) if is_replica else group.names
        stages = cost.worker.ffn_parallel.pipeline if is_replica else 1
        servers = [name for name in names for _ in range(stages)]
        part = _Part(pipeline, group.attention.index(worker), len(group.attention), len(servers))
        mine = servers[part.first : part.first + part.pipeline.ffn_workers]
        others = [name for name in servers if name not in mine][:MOST_SPARES] if is_replica else []
        outages = [
            Outage(index, loss.at - began, loss.back - began)
            for index, name in enumerate((*mine, *others))
            if (loss := group.down.get(name)) is not None and loss.back > began
        ]
        own_rows = rows * pipeline.cohort_size

        def batch_seconds(server: int, requests: Sequence[FfnRequest]) -> float:
            layer = pipeline.layers[0].ffn_seconds
            asked = rows * len(requests) * part.stands_for + (own_rows if server >= len(mine) else 0)
            parts = pipeline.parts
            return layer * cost.worker.ffn_layer_seconds(asked, parts) / cost.worker.ffn_layer_seconds(own_rows, parts)

        played = play_step(
            part.pipeline,
            self._rules(pool, rows),
            of=part.index,
            outages=outages,
            spares=len(others),
            rows=rows,
            batch_seconds=batch_seconds,
            has_weights=worker in self._with_weights,
        )
        if played.has_loaded[part.index]:
            self._with_weights.add(worker)
        seconds, problem = played.seconds[part.index], played.problems[part.index]
        for loss in losses:
            loss.num_steps += 1
            loss.num_retries += played.num_retries
            loss.num_computed_here += played.num_computed_here
            loss.num_failed_steps += problem is not None
            loss.longest_delay = max(loss.longest_delay, seconds - cost.step_seconds(shape))
        return seconds, problem

    def _rules(self, pool: SimulatedPool, rows: int) -> FfnRules:
        split = pool.spec.ffn
        assert split is not None
        here = self._layer_here(pool, rows) if self._computes_here(pool) else None
        return FfnRules(
            fallback=split.fallback,
            timeout_seconds=split.timeout_seconds,
            deadline_seconds=split.deadline_seconds,
            max_wait_seconds=split.max_wait_seconds,
            notice_seconds=self._message_seconds,
            local_seconds=here,
            load_seconds=self._bytes_here(pool) / LOAD_BYTES_PER_SECOND,
            no_room=self._no_room(pool),
        )

    # -- without FFN workers ------------------------------------------------------------------------------------------

    def _computes_here(self, pool: SimulatedPool) -> bool:
        """Whether the pool's workers can take the feed-forwards themselves: they may, and hold the weights."""
        return pool.spec.ffn is not None and pool.spec.ffn.fallback == "local" and self._lacking_bytes(pool) <= 0

    def _bytes_here(self, pool: SimulatedPool) -> int:
        """Of feed-forwards on each chip of an attention worker."""
        return ffn_chip_bytes(self._cluster.card, pool.spec.parallel, self._cluster.precision)

    def _lacking_bytes(self, pool: SimulatedPool) -> float:
        """What a chip lacks for the feed-forwards beside its attention side and its KV cache."""
        assert isinstance(pool.cost, SplitCost)
        memory = pool.cost.worker.attention_memory
        room = memory.usable_bytes - memory.weight_bytes
        taken = room * min(1.0, pool.num_blocks * pool.spec.block_size / memory.kv_tokens)
        return self._bytes_here(pool) - (room - taken)

    def _no_room(self, pool: SimulatedPool) -> str:
        lacking = format_bytes(int(max(0.0, self._lacking_bytes(pool))))
        return (
            f"a worker of {pool.spec.name} lacks {lacking} a chip for the weights beside its KV cache; make that "
            f"smaller: pools.{pool.spec.name}.memory"
        )

    def _layer_here(self, pool: SimulatedPool, rows: int) -> float:
        cost = self._here.get(pool.spec.name)
        if cost is None:
            assert isinstance(pool.cost, SplitCost)
            worker = pool.cost.worker
            cost = self._here[pool.spec.name] = WorkerCost(
                pool.chip, worker.card, worker.attention_parallel, worker.precision, worker.engine, scope="ffn"
            )
        fixed, _ = cost.decode_coefficients(rows)
        return max(0.0, fixed - cost.plan.overhead.step_seconds) / self._cluster.card.num_layers

    def _step_here(self, worker: WorkerId, pool: SimulatedPool, shape: StepShape, losses: list[_Loss]) -> float:
        """A step that begins with no FFN worker there: one micro-batch after the other, both halves of each layer."""
        cost = pool.cost
        assert isinstance(cost, SplitCost)
        pipeline = cost.pipeline_of(shape)
        rows = math.ceil(shape.num_tokens / pipeline.micro_batches)
        layer = pipeline.layers[0].attention_seconds + self._layer_here(pool, rows)
        seconds = layer * pipeline.micro_batches * pipeline.num_layers + pipeline.tail_seconds
        if worker not in self._with_weights:
            self._with_weights.add(worker)
            seconds += self._bytes_here(pool) / LOAD_BYTES_PER_SECOND
        for loss in losses:
            loss.num_steps += 1
            loss.num_computed_here += pipeline.micro_batches * pipeline.num_layers
            loss.longest_delay = max(loss.longest_delay, seconds - cost.step_seconds(shape))
        return seconds

    # -- who and how many ---------------------------------------------------------------------------------------------

    def _group_of(self, pool: SimulatedPool) -> _Group:
        assert pool.spec.ffn is not None
        return self._groups[pool.spec.ffn.pool]

    def _cost(self, pool: SimulatedPool, num_ffn: int) -> SplitCost:
        """A worker's steps with so many FFN workers."""
        whole = pool.cost
        assert isinstance(whole, SplitCost)
        if num_ffn == whole.ffn_workers:
            return whole
        key = pool.spec.name, num_ffn
        found = self._costs.get(key)
        if found is None:
            found = self._costs[key] = SplitCost(
                whole.worker,
                attention_workers=whole.attention_workers,
                ffn_workers=num_ffn,
                micro_batches=whole.micro_batches,
                shares_price=whole.shares_price,
            )
        return found

    def _load_seconds(self, group: _Group) -> float:
        cost = self._pools[group.attention[0]].cost
        assert isinstance(cost, SplitCost)
        return cost.worker.ffn_memory.weight_bytes / LOAD_BYTES_PER_SECOND


class _Part:
    """The part of a pipeline that a step of one attention worker sees: its cohort and their FFN workers."""

    def __init__(self, pipeline: Pipeline, worker: int, num_attention: int, num_servers: int) -> None:
        """`worker`: its place among `num_attention`. A step with prompts in it is a pipeline of its own rows alone."""
        cohort = pipeline.cohort_size
        is_replica = pipeline.split == "replica"
        if is_replica and pipeline.attention_workers == 1:
            num_mine = min(pipeline.ffn_workers, num_servers)
            self.first, num_servers = min(worker * num_servers // num_attention, num_servers - num_mine), num_mine
        elif is_replica and pipeline.ffn_workers >= pipeline.attention_workers:
            self.first, num_servers = worker * pipeline.replicas, pipeline.replicas
        elif is_replica:
            self.first, num_servers = worker // cohort, 1
        else:
            self.first = 0
        self.stands_for = cohort if cohort > MOST_PLAYED else 1
        """Attention workers that each played one sends for."""
        num_workers = 1 if self.stands_for > 1 else cohort
        self.index = 0 if self.stands_for > 1 else worker % cohort
        apart = pipeline.attention_workers / num_workers
        layers = tuple(
            msgspec.structs.replace(
                layer,
                **{
                    side: msgspec.structs.replace(
                        hop,
                        ffn_port_seconds=hop.ffn_port_seconds * self.stands_for,
                        shared_seconds=hop.shared_seconds * apart,
                    )
                    for side, hop in (("out", layer.out), ("back", layer.back))
                },
            )
            for layer in pipeline.layers
        )
        self.pipeline = msgspec.structs.replace(
            pipeline, layers=layers, attention_workers=num_workers, ffn_workers=num_servers
        )


def ffn_worker_names(pools: Sequence[Pool]) -> list[str]:
    """Of all pools of role ffn."""
    return [f"{pool.name}-{index}" for pool in pools if pool.role == "ffn" for index in range(pool.workers)]
