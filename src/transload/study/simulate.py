"""A deployment over chips that nobody here owns, under a workload, in virtual time: the machines that serve, simulated.

    simulate(deployment, workload) -> Result

Drives the shipped controller and engines; decides nothing itself. Chance comes from the workload's seed alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from transload.control.controller import ControllerConfig
from transload.control.engine import EngineConfig
from transload.control.messages import Request, RequestId, WorkerId
from transload.deploy.load import load
from transload.deploy.spec import Deployment, Targets
from transload.errors import DeploymentError
from transload.runtime.cluster import VirtualWorker
from transload.runtime.cost import CostModel
from transload.runtime.shared_machine import MachineModel
from transload.runtime.virtual import VirtualRuntime
from transload.study.ffn_workers import FfnWorkers
from transload.study.recorder import Recorder
from transload.study.result import Result
from transload.study.scenario import apply_faults, parse_fault
from transload.study.schedule import Due, Schedule
from transload.study.simulated import ClusterCost, SimulatedCluster, plan_cluster, pool_of_worker
from transload.study.summing_up import RunFacts, sum_up
from transload.study.timeline import TimelineRecorder
from transload.study.traces import find_trace, open_trace
from transload.study.workload import Workload, prefix_keys

RUN_STEPS = 32
"""Most steps of an unchanged batch that a simulated worker goes through, and reports, at once."""
HOLD_TOKENS = 256
"""Most tokens of a request that a simulated worker keeps to itself while nobody asks."""
EVENTS_BETWEEN_LOOKS = 5_000
KEEP_ENDED = 64
NAMESPACE = b"simulated"


class Progress(msgspec.Struct, frozen=True):
    """How far a simulation is."""

    num_ended: int
    num_requests: int | None
    simulated_seconds: float


def simulate(
    deployment: Deployment | str | Path,
    workload: Workload | str | Path,
    *,
    seed: int = 0,
    name: str | None = None,
    assume: Iterable[str] = (),
    faults: Iterable[str] = (),
    with_records: bool = False,
    with_steps: bool = False,
    cost: CostModel | None = None,
    jumps: bool = True,
    timeline: TimelineRecorder | None = None,
    progress: Callable[[Progress], bool] | None = None,
) -> Result:
    """Play a workload on a deployment in virtual time.

    A path stands for the deployment file or the trace at that place; the name of a shipped trace, such as
    "conversation", for that trace. `seed` decides what chance the control plane has; the workload has a seed of its
    own. `assume` and `faults` are in the words of `--assume` and `--fault`. `cost` replaces the catalog's durations.
    `jumps` False goes step by step, with the same result. `timeline` is shown every event. `progress` is called now
    and then and ends the run, keeping what there is, by answering False.

    Raises `DeploymentError` for what cannot be simulated as asked.
    """
    if not isinstance(deployment, Deployment):
        name = name or str(deployment)
        deployment = load(Path(deployment))
    if not isinstance(workload, Workload):
        workload = open_trace(find_trace(workload))
    cluster = plan_cluster(deployment, assume)
    disturbances = [parse_fault(text, cluster) for text in faults]
    began_at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.process_time()
    simulation = Simulation(cluster, workload, cost or ClusterCost(cluster), seed=seed, jumps=jumps,
                            front_end=front_end_of(cluster) if cost is None else None,
                            with_records=with_records, with_steps=with_steps, timeline=timeline)  # fmt: skip
    apply_faults(simulation.runtime, disturbances)
    was_interrupted = not simulation.run(progress)
    facts = RunFacts(
        name=name or "deployment",
        workload=workload,
        seed=seed,
        started_at=began_at,
        cpu_seconds=time.process_time() - began,
        was_interrupted=was_interrupted,
        faults=tuple(faults),
    )
    losses = simulation.ffn.losses if simulation.ffn is not None else ()
    return sum_up(cluster, simulation.recorder, facts, losses)


FrontEnd = Callable[[int, int], float]
"""(prompt tokens, requests in flight) -> seconds from a request's being sent to its being known to the controller."""


def front_end_of(cluster: SimulatedCluster) -> FrontEnd:
    """That of the engine on the chips where prompts are computed."""
    return next(pool.cost.request_seconds for pool in cluster.pools if pool.spec.role != "decode")


class Simulation:
    """One run under way."""

    def __init__(
        self,
        cluster: SimulatedCluster,
        workload: Workload,
        cost: CostModel,
        *,
        seed: int = 0,
        jumps: bool = True,
        front_end: FrontEnd | None = None,
        with_records: bool = False,
        with_steps: bool = False,
        timeline: TimelineRecorder | None = None,
        machine: MachineModel | None = None,
    ) -> None:
        """`front_end` says how long a request takes to the controller; None: no time. `machine`: as for
        `VirtualRuntime`."""
        self._cluster = cluster
        self._front_end = front_end
        self._workload = workload
        self._schedule = Schedule(workload)
        self._wanted: float | None = None  # when the workload is to be looked at next
        self._block_size = cluster.pools[0].spec.block_size
        deployment = cluster.deployment
        self.recorder = Recorder(
            pool_of_worker(cluster),
            deployment.targets,
            self._ended,
            with_records=with_records,
            with_steps=with_steps,
        )
        kept = deployment.targets if deployment.server.admission == "targets" else Targets()
        self.ffn = FfnWorkers(cluster, cost.message_seconds()) if cluster.ffn_pools else None
        self.runtime = VirtualRuntime(
            ControllerConfig(
                policy=deployment.router.policy,
                local_prefill=deployment.router.local_prefill,
                max_attempts=deployment.router.max_attempts,
                max_waiting=deployment.server.max_waiting,
                ttft_seconds=kept.ttft_seconds,
                tpot_seconds=kept.tpot_seconds,
                keep_ended=KEEP_ENDED,
            ),
            virtual_workers(cluster, seed, jumps=jumps),
            cost,
            self.recorder,
            watcher=self.recorder,
            observe=None if timeline is None else timeline.observe,
            ffn=self.ffn,
            jumps=jumps,
            machine=machine,
        )
        self.recorder.controller = self.runtime.controller

    def run(self, progress: Callable[[Progress], bool] | None = None) -> bool:
        """To the end; False if `progress` has ended it before."""
        runtime, recorder = self.runtime, self.recorder
        goes_on = True
        gc.freeze()  # nothing in a run refers to itself in a circle: looking for that takes time and finds nothing
        before = gc.get_threshold()
        gc.set_threshold(200_000, 50, 100)
        try:
            runtime.call(0.0, self._look)
            while runtime.run_events(EVENTS_BETWEEN_LOOKS):
                ended = recorder.num_due - len(recorder.live)
                if not recorder.live and self._schedule.is_over:
                    break  # timers alone are left
                if progress is not None and not progress(Progress(ended, self._workload.num_requests, runtime.now)):
                    goes_on = False
                    break
        except KeyboardInterrupt:
            goes_on = False
        finally:
            gc.set_threshold(*before)
            gc.unfreeze()
        recorder.close(recorder.last_end if goes_on else runtime.now)
        return goes_on

    def _look(self) -> None:
        """Submit what is due, and look again when the next is."""
        now = self.runtime.now
        if self._wanted is not None and self._wanted <= now:
            self._wanted = None
        while (due := self._schedule.take(now)) is not None:
            self._submit(due)
        following = self._schedule.next_seconds()
        if following is not None and (self._wanted is None or following < self._wanted):
            self._wanted = following
            self.runtime.call(following, self._look)

    def _submit(self, due: Due) -> None:
        arrival = due.arrival
        request = Request(
            RequestId(due.number + 1),
            arrival.num_input_tokens,
            arrival.num_output_tokens,
            block_keys=prefix_keys(arrival, self._workload.block_size, self._block_size, NAMESPACE),
            deadline_seconds=self._cluster.deployment.server.request_timeout_seconds,
        )
        self.recorder.begin(request.id, due.number, arrival, due.due_seconds)
        num_tokens = arrival.num_input_tokens + arrival.num_output_tokens
        if num_tokens > self._cluster.max_context:
            why = f"longer than the model's context of {self._cluster.max_context} tokens"
            self.recorder.refuse(request.id, why, self.runtime.now)
        else:
            waits = self._front_end(arrival.num_input_tokens, len(self.recorder.live)) if self._front_end else 0.0
            self.runtime.submit(self.runtime.now + waits, request)

    def _ended(self, due_arrival: object, now: float) -> None:
        self._schedule.ended(due_arrival, now)  # type: ignore[arg-type]
        self._look_again(now)

    def _look_again(self, now: float) -> None:
        """What waited for an answer may start now, or after a while of thinking."""
        following = self._schedule.next_seconds()
        if following is not None and (self._wanted is None or following < self._wanted):
            self._wanted = following
            self.runtime.call(max(now, following), self._look)


def virtual_workers(cluster: SimulatedCluster, seed: int, *, jumps: bool = True) -> list[VirtualWorker]:
    """The workers of a cluster as the virtual runtime takes them."""
    layers_per_frame = {link.source: link.layers_per_frame for link in cluster.links}
    leases = {name: link.lease_seconds for link in cluster.links for name in (link.source, link.target)}
    apart = {name for link in cluster.links if not link.in_place for name in (link.source, link.target)}
    num_layers = cluster.card.num_layers
    workers: list[VirtualWorker] = []
    for pool in cluster.pools:
        spec = pool.spec
        role = spec.role
        if role == "ffn":
            raise DeploymentError(f'pool "{spec.name}" holds no requests')
        for worker in pool.worker_names:
            engine = EngineConfig(
                worker=WorkerId(worker),
                num_blocks=pool.num_blocks,
                block_size=spec.block_size,
                num_layers=num_layers,
                cell_bytes=max(1, round(cluster.kv_bytes_per_token * spec.block_size / num_layers)),
                namespace=NAMESPACE,
                max_batch=spec.limits.max_batch,
                step_tokens=spec.limits.step_tokens,
                lease_seconds=leases.get(spec.name, 10.0),
                seed=cluster.deployment.seed + seed,
                run_steps=RUN_STEPS,
                hold_tokens=HOLD_TOKENS if jumps else 0,
            )
            workers.append(
                VirtualWorker(
                    engine=engine,
                    pool=spec.name,
                    role=role,
                    layers_per_frame=layers_per_frame.get(spec.name, num_layers),
                    in_place=spec.name not in apart,
                )
            )
    return workers
