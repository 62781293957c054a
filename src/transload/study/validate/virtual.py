"""The virtual side: a deployment that this machine serves, simulated with what was measured of the machine."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import msgspec

from transload.deploy.spec import Deployment, Link, Pool, Targets
from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip
from transload.hardware.measured import MeasuredSteps, Slowdown
from transload.study.calibrate.shared_machine import SharedMachineCost
from transload.study.curves import latency_curves
from transload.study.metrics import Distribution, RequestRecord, Summary, summarize
from transload.study.result import Result
from transload.study.simulate import Simulation
from transload.study.simulated import ClusterCost, plan_cluster
from transload.study.summing_up import RunFacts, sum_up
from transload.study.validate.compare import stage_distributions
from transload.study.workload import ClosedLoop, Fixed, Synthetic, Workload, synthetic

CAPACITY_USERS = 48
CAPACITY_REQUESTS = 192


class VirtualRun(msgspec.Struct, frozen=True, kw_only=True):
    records: list[RequestRecord]
    summary: Summary
    stages: dict[str, Distribution]
    """Seconds of a request, by name of stage."""
    result: Result


def measured_of(chip_path: str) -> MeasuredSteps:
    """Raises `DeploymentError` if the file is none that `transload calibrate` wrote."""
    chip = load_chip(chip_path)
    if chip.measured is None:
        raise DeploymentError(
            f"--chip {chip_path}: has no `measured` section; want a file that `transload calibrate -o` wrote"
        )
    return chip.measured


def play_virtual(
    deployment: Deployment, chip_path: str, workload: Workload, *, drift: Slowdown | None = None, name: str = ""
) -> VirtualRun:
    """All workers on one machine, which is the measured one, slower by `drift`. `name` is the result's."""
    started_at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.process_time()
    measured = measured_of(chip_path)
    cluster = plan_cluster(_on_chip(deployment, chip_path))
    cost = SharedMachineCost(ClusterCost(cluster), measured, drift or Slowdown())
    simulation = Simulation(cluster, workload, cost, seed=deployment.seed, jumps=False, machine=cost, with_records=True)
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
        sum_up(cluster, recorder, facts), summary=summary, curves=latency_curves(records), requests=None
    )
    return VirtualRun(
        records=records,
        summary=summary,
        stages=stage_distributions(recorder.stage_times or []),
        result=result,
    )


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
