"""What docs/accuracy.md says is what the committed parameters give, and as good as was wanted."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from transload.hardware.catalog import load_chip, load_model
from transload.hardware.cost.efficiency import efficiency_of_class
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.slots import parse_assumption

ROOT = Path(__file__).parents[2]
EVERY = 60


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts' modules by name."""
    for folder in (ROOT / "scripts", ROOT / "scripts" / "cost"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return import_module


@pytest.fixture(scope="module")
def evaluated(scripts: Any) -> Any:
    return scripts("evaluate").load()


def test_the_parameters_that_ship_are_those_of_the_fit(scripts: Any) -> None:
    fitted = json.loads((ROOT / "silicon" / "fits.json").read_text())
    shipped = efficiency_of_class("gpu")
    assert scripts("parameters").efficiency(fitted["full"], shipped.basis) == shipped


@pytest.mark.parametrize("way", ["all", "half", "without"])
def test_committed_durations_come_from_committed_parameters(scripts: Any, evaluated: Any, way: str) -> None:
    fitted = json.loads((ROOT / "silicon" / "fits.json").read_text())
    points = {point.id: point for point in scripts("evaluate").taken()}
    chosen = [one for one in evaluated if way in one.tpot_by and points[one.id].concurrency <= 64][::EVERY]
    assert len(chosen) > 5
    for one in chosen:
        values = {"all": fitted["full"], "half": fitted["half"], "without": fitted["without"].get(one.chip)}[way]
        served = scripts("served").serve(points[one.id], scripts("parameters").efficiency(values))
        assert served.tpot == pytest.approx(one.tpot_by[way], rel=1e-3), one.id
        assert served.ttft == pytest.approx(one.ttft_by[way], rel=1e-3), one.id


def test_errors_are_as_small_as_was_wanted(scripts: Any, evaluated: Any) -> None:
    errors = scripts("make_accuracy_docs").errors
    admitted = [one for one in evaluated if one.apart != "not admitted"]
    dense, mixtures = ([one for one in admitted if one.dense is dense] for dense in (True, False))
    _, _, median, mean = errors(dense, "tpot", "all")
    assert (median <= 0.10, mean <= 0.15) == (True, True)
    assert errors(mixtures, "tpot", "all")[3] <= 0.20
    assert errors(admitted, "ttft", "all")[2] <= 0.30
    assert errors(dense, "tpot", "half")[3] <= 0.20
    assert errors(mixtures, "tpot", "half")[3] <= 0.25


def test_the_page_is_what_the_script_writes(scripts: Any, evaluated: Any) -> None:
    docs = scripts("make_accuracy_docs")
    assert docs.PAGE.read_text() == docs.page(evaluated, docs.refused_rows())
    intervals = json.loads((docs.PACKAGE / "intervals.json").read_text())
    assert docs.intervals(evaluated) == intervals


def test_equal_measurements_count_once(scripts: Any) -> None:
    points, refused = scripts("points").read_points()
    seen = {(p.mode, p.backend, p.chip, p.prompt_tokens, p.output_tokens, p.tpot, p.ttft) for p in points}
    assert len(seen) == len(points)
    assert len(points) + len(refused) == 3012


def test_the_fit_is_deterministic(scripts: Any) -> None:
    kernels, fitting = scripts("kernels"), scripts("fitting")
    fitted = json.loads((ROOT / "silicon" / "fits.json").read_text())
    table, seconds = kernels.gemm("bf16")
    start = kernels.curve_parameters(0.7, 64, 0.7, 3e-6)
    assert kernels.fit_curve(table, seconds, start) == pytest.approx(fitted["kernels"]["gemm.bf16"], rel=1e-6)
    points = [point for point in scripts("evaluate").taken() if point.concurrency <= 8][::30]
    parameters = scripts("parameters").parameters(fitted["kernels"])
    queues = fitting.queues_of(points, fitted["full"])
    once, again = (fitting.fit_points(points, parameters, queues, steps=1) for _ in range(2))
    assert once == again


def test_a_parameter_touches_the_points_it_is_said_to_touch(scripts: Any) -> None:
    fitting, served = scripts("fitting"), scripts("served")
    efficiency, fitted = scripts("parameters").efficiency, json.loads((ROOT / "silicon" / "fits.json").read_text())
    points = [point for point in scripts("evaluate").taken() if point.concurrency <= 16][::25]
    queues = fitting.queues_of(points, fitted["full"])
    before = [served.scaled(p, efficiency(fitted["full"]), q) for p, q in zip(points, queues, strict=True)]
    for name in fitted["full"]:
        moved = efficiency(fitted["full"] | {name: fitted["full"][name] * 0.7})
        for point, queue, old in zip(points, queues, before, strict=True):
            if not fitting.touches(name, point):
                assert served.scaled(point, moved, queue) == old, (name, point.id)


def test_intervals_widen_from_fitted_to_unseen_to_claimed() -> None:
    for model in ("llama-3.1-70b", "deepseek-v3"):
        card = load_model(model)
        fitted = WorkerCost(load_chip("h100"), card)
        unseen = WorkerCost(load_chip("a100_80g_sxm"), card)
        claimed = WorkerCost(load_chip("h100").assuming([parse_assumption("h100_sxm.dense_flops.fp4=4 PFLOP/s")]), card)
        for one in (fitted, unseen, claimed):
            for low, high in (one.interval, one.ttft_interval):
                assert low <= 1 <= high
        assert fitted.interval[1] - fitted.interval[0] < claimed.interval[1] - claimed.interval[0]
        assert unseen.interval[1] <= claimed.interval[1]
        assert unseen.interval[0] >= claimed.interval[0]


def test_a_full_prefill_pool_holds_its_clients_back(scripts: Any) -> None:
    replay = scripts("replay")
    pools = replay.Pools(lambda count: 0.5 * count, 2, 2, lambda count: 0.001)
    todo = replay.requests(500, 1000, 100, 0.1, seed=0)
    ttft, tpot = replay.closed_loop_apart(pools, todo, 50)
    assert tpot == pytest.approx(0.001, rel=1e-6)
    assert ttft + 100 * tpot == pytest.approx(50 * 0.5 / 2, rel=0.1)  # requests in flight over the pool's rate
    alone, _ = replay.closed_loop_apart(pools, replay.requests(10, 1000, 100, 0.0, seed=0), 1)
    assert alone == pytest.approx(0.5)


def test_rows_dealt_out_evenly_are_counted_as_they_fall(scripts: Any) -> None:
    shapes = ((256, 8, 32), (256, 8, 8), (128, 4, 128), (384, 8, 48), (512, 10, 64))
    cases = [(tokens, *shape) for tokens in (1, 7, 40, 300) for shape in shapes]
    rows, touched = scripts("kernels").evenly_dealt(*np.array(cases, dtype=float).T)
    for case, found, distinct in zip(cases, rows, touched, strict=True):
        tokens, experts, k, local = case
        stride = -(-experts // k)
        hit = [expert for i in range(tokens) for j in range(k) if (expert := (i + j * stride) % experts) < local]
        assert (round(found), round(distinct)) == (len(hit), min(local, len(hit))), case
        assert len(set(hit)) == round(distinct), case


def test_prediction_does_not_depend_on_what_was_measured(scripts: Any) -> None:
    served = scripts("served")
    point = next(point for point in scripts("evaluate").taken() if point.concurrency == 4)
    other = type(point)(
        **{**{name: getattr(point, name) for name in point.__dataclass_fields__}, "ttft": 9.0, "tpot": 9.0}
    )
    assert served.serve(point) == served.serve(other)


def test_all_classes_have_parameters_that_compute_at_all() -> None:
    card = load_model("smollm2-135m")
    for chip in ("trainium2", "sn50", "lp30", "epyc_9654", "mi300x", "rubin_r200", "gb300"):
        seconds = WorkerCost(load_chip(chip), card).step_seconds(StepShape(((0, 64),), 2, 100))
        assert np.isfinite(seconds)
        assert 0 < seconds < 1
    assert msgspec.json.decode(msgspec.json.encode(efficiency_of_class("lpu")), type=dict)["measured"] is False
