"""Every measured point beside what the model says of it: fitted on all, on the other half, and without its chip.

Kept in silicon/evaluated.csv.gz, so that documents and tests need no second evaluation.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apart import beyond_light, not_admitted, suspected_speculation
from kernels import TABLES
from parameters import efficiency
from points import Point, read_points
from served import Served, fits, serve

FILE = TABLES / "evaluated.csv.gz"
FITS = TABLES / "fits.json"
WAYS = ("all", "half", "without")
"""all: the parameters that ship. half: fitted on the other half of the runs; empty for points it was fitted on.
without: fitted without the point's chip."""


@dataclass(frozen=True)
class Evaluated:
    """A point, its measured and its simulated durations in seconds by way of fitting."""

    id: str
    chip: str
    model: str
    backend: str
    mode: str
    campaign: str
    dense: bool
    apart: str
    """not admitted, suspected speculation, or nothing; beyond the speed of light is in `light`."""
    light: bool
    tpot: float
    ttft: float
    tpot_by: dict[str, float]
    ttft_by: dict[str, float]


def evaluate(first_half: Sequence[bool], points: Sequence[Point]) -> list[Evaluated]:
    """All points in all ways."""
    fitted = json.loads(FITS.read_text())
    served: list[dict[str, Served]] = [{} for _ in points]
    under = efficiency(fitted["full"])
    for place, point in enumerate(points):
        served[place]["all"] = serve(point, under)
    under = efficiency(fitted["half"])
    for place, point in enumerate(points):
        if not first_half[place]:
            served[place]["half"] = serve(point, under)
    for chip, values in fitted["without"].items():
        under = efficiency(values)
        for place, point in enumerate(points):
            if point.chip == chip:
                served[place]["without"] = serve(point, under)
    return _labelled(points, served)


def _labelled(points: Sequence[Point], served: Sequence[dict[str, Served]]) -> list[Evaluated]:
    light, speculation = beyond_light(points), suspected_speculation(points)
    found = []
    for point, ways in zip(points, served, strict=True):
        apart = "not admitted" if not_admitted(point) else ""
        if not apart and point.id in speculation:
            apart = "suspected speculation"
        found.append(
            Evaluated(
                id=point.id,
                chip=point.chip,
                model=point.model,
                backend=point.backend,
                mode=point.mode,
                campaign=point.campaign,
                dense=point.dense,
                apart=apart,
                light=point.id in light,
                tpot=point.tpot,
                ttft=point.ttft,
                tpot_by={way: one.tpot for way, one in ways.items()},
                ttft_by={way: one.ttft for way, one in ways.items()},
            )
        )
    return found


COLUMNS = (
    "id", "chip", "model", "backend", "mode", "campaign", "dense", "apart", "light", "tpot", "ttft",
    *(f"{duration}_{way}" for duration in ("tpot", "ttft") for way in WAYS),
)  # fmt: skip


def save(evaluated: Iterable[Evaluated]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in evaluated:
        row: list[object] = [
            one.id,
            one.chip,
            one.model,
            one.backend,
            one.mode,
            one.campaign,
            int(one.dense),
            one.apart,
        ]
        row += [int(one.light), f"{one.tpot:.5g}", f"{one.ttft:.5g}"]
        for by in (one.tpot_by, one.ttft_by):
            row += [f"{by[way]:.5g}" if way in by else "" for way in WAYS]
        writer.writerow(row)
    with FILE.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.getvalue().encode())


def load() -> list[Evaluated]:
    with gzip.open(FILE, "rt") as file:
        rows = list(csv.DictReader(file))
    return [
        Evaluated(
            id=row["id"],
            chip=row["chip"],
            model=row["model"],
            backend=row["backend"],
            mode=row["mode"],
            campaign=row["campaign"],
            dense=row["dense"] == "1",
            apart=row["apart"],
            light=row["light"] == "1",
            tpot=float(row["tpot"]),
            ttft=float(row["ttft"]),
            tpot_by={way: float(row[f"tpot_{way}"]) for way in WAYS if row[f"tpot_{way}"]},
            ttft_by={way: float(row[f"ttft_{way}"]) for way in WAYS if row[f"ttft_{way}"]},
        )
        for row in rows
    ]


def taken() -> list[Point]:
    """Points that the model takes: memory and split."""
    return [point for point in read_points()[0] if fits(point)]
