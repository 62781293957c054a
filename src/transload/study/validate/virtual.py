"""The virtual side: a deployment that this machine serves, simulated with what was measured of the machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from transload.control.messages import WorkerId
from transload.deploy.spec import Deployment, Link, Pool, Targets
from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip
from transload.hardware.cost.measured import MeasuredStepCost
from transload.hardware.measured import MeasuredSteps, Slowdown, WorkKind
from transload.study.calibrate.shared_machine import SharedMachineCost
from transload.study.curves import latency_curves
from transload.study.metrics import Distribution, RequestRecord, Summary, summarize
from transload.study.result import Result
from transload.study.simulate import Simulation
from transload.study.simulated import ClusterCost, plan_cluster
from transload.study.summing_up import RunFacts, sum_up
from transload.study.validate.compare import stage_distributions
from transload.study.validate.steps import Speeds, StepSum, alone_on, find_speeds, sum_steps
from transload.study.workload import ClosedLoop, Fixed, Synthetic, Workload, synthetic

CAPACITY_USERS = 48
CAPACITY_REQUESTS = 192


class VirtualRun(msgspec.Struct, frozen=True, kw_only=True):
    records: list[RequestRecord]
    summary: Summary
    stages: dict[str, Distribution]
    """Seconds of a request, by name of stage."""
    steps: tuple[StepSum, ...]
    result: Result


class _Times:
    """How many times as long steps take as they were measured: always the same, or as it was at that time."""

    def __init__(self, drift: Slowdown, speeds: Speeds) -> None:
        self._drift: dict[WorkKind, float] = {"prefill": drift.prefill, "decode": drift.decode}
        self._speeds = speeds
        self.simulation: Simulation | None = None

    def __call__(self, worker: WorkerId, kind: WorkKind) -> float:
        speed = self._speeds.get((worker, kind))
        if speed is None:
            return self._drift[kind]
        assert self.simulation is not None
        return speed.at(self.simulation.runtime.now)


def measured_of(chip_path: str) -> MeasuredSteps:
    """Raises `DeploymentError` if the file is none that `transload calibrate` wrote."""
    chip = load_chip(chip_path)
    if chip.measured is None:
        raise DeploymentError(
            f"--chip {chip_path}: has no `measured` section; want a file that `transload calibrate -o` wrote"
        )
    return chip.measured


def play_virtual(
    deployment: Deployment,
    chip_path: str,
    workload: Workload,
    *,
    drift: Slowdown | None = None,
    speeds: Speeds | None = None,
    name: str = "",
) -> VirtualRun:
    """All workers on one machine, which is the measured one, slower by `drift`, or by `speeds` where they say. `name`
    is the result's."""
    started_at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.process_time()
    measured = measured_of(chip_path)
    cluster = plan_cluster(_on_chip(deployment, chip_path))
    times = _Times(drift or Slowdown(), speeds or {})
    cost = SharedMachineCost(ClusterCost(cluster), measured, times)
    times.simulation = simulation = Simulation(cluster, workload, cost, seed=deployment.seed, jumps=False,
                                               machine=cost, with_records=True, with_steps=True)  # fmt: skip
    simulation.run()
    recorder = simulation.recorder
    records = [_felt(record, measured.front_end.request_seconds) for record in recorder.records or []]
    summary = summarize(records, Targets())
    facts = RunFacts(
        name=name,
        workload=workload,
        seed=workload.seed,
        started_at=started_at,
        cpu_seconds=time.process_time() - began,
        was_interrupted=False,
        faults=(),
    )
    result = msgspec.structs.replace(
        sum_up(cluster, recorder, facts), summary=summary, curves=latency_curves(records), requests=None, steps=None
    )
    return VirtualRun(
        records=records,
        summary=summary,
        stages=stage_distributions(recorder.stage_times or []),
        steps=sum_steps(recorder.step_list or ()),
        result=result,
    )


def play_with_steps(
    deployment: Deployment, chip_path: str, workload: Workload, steps: Sequence[StepSum], *, name: str = ""
) -> tuple[VirtualRun, Speeds]:
    """The same, with steps that take as long as those of the real run did; and how many times as long that is as they
    took when the machine was measured."""

    def play(speeds: Speeds) -> tuple[VirtualRun, Sequence[StepSum]]:
        run = play_virtual(deployment, chip_path, workload, speeds=speeds, name=name)
        return run, run.steps

    alone = alone_on(MeasuredStepCost(measured_of(chip_path)), tuple(workload))
    speeds, run = find_speeds(steps, alone, play)
    return run, speeds


def _on_chip(deployment: Deployment, chip_path: str) -> Deployment:
    """Workers whose feed-forwards are elsewhere were measured with them: to the simulation they are one worker. Links
    are those that a single host makes of what is `auto`."""
    pools = tuple(
        msgspec.structs.replace(pool, chip=chip_path, ffn=None) for pool in deployment.pools if pool.role != "ffn"
    )
    listed = {frozenset(link.between): link for link in deployment.links}
    links = tuple(
        _on_one_host(listed.get(frozenset((source.name, target.name))), source, target)
        for source in pools
        for target in pools
        if (source.role, target.role) == ("prefill", "decode")
    )
    return msgspec.structs.replace(deployment, pools=pools, links=links)


def _on_one_host(listed: Link | None, source: Pool, target: Pool) -> Link:
    link = listed or Link(between=(source.name, target.name))
    is_shared = link.transport == "auto" and source.device == target.device == "cpu"
    return msgspec.structs.replace(link, transport="direct") if is_shared else link


def capacity(
    deployment: Deployment, chip_path: str, num_input: int, num_output: int, drift: Slowdown | None = None
) -> float:
    """Requests a second when there are always more of them than can be served, simulated."""
    crowd = synthetic(
        Synthetic(
            arrivals=ClosedLoop(CAPACITY_USERS),
            input=Fixed(num_input),
            output=Fixed(num_output),
            num_requests=CAPACITY_REQUESTS,
            seed=0,
        )
    )
    return play_virtual(deployment, chip_path, crowd, drift=drift).summary.requests_per_second


def _felt(record: RequestRecord, seconds: float) -> RequestRecord:
    """As its user felt it: the front end is between."""
    return msgspec.structs.replace(
        record,
        token_seconds=[at + seconds for at in record.token_seconds],
        end_seconds=record.end_seconds + seconds,
    )
