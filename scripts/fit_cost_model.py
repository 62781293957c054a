"""Fits the cost model of GPUs on silicon/: `python scripts/fit_cost_model.py`. Takes minutes; the same input, the same
output.

Writes the parameters of the package (efficiency/gpu.json), the factors of its intervals (efficiency/intervals.json),
and silicon/fits.json: the same fit on one half of the runs, and once without each chip, which docs/accuracy.md is
made from (scripts/make_accuracy_docs.py).
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cost"))

import msgspec
from apart import not_admitted
from fitting import fit_points, queues_of
from kernels import CHIPS, TABLES, kernel_curves
from least_squares import Parameter
from parameters import FITTED_CHIPS, efficiency, parameters
from points import Point, read_points
from served import Queueing, fits

PACKAGE = Path(__file__).parents[1] / "src" / "transload" / "hardware" / "cost" / "efficiency"
PROCESSES = 2
PART_STEPS = 6
BASIS = (
    "fitted on measured kernels of H100, H200, B200, B300, GB200 and GB300, on DeepGEMM's published rates, and on "
    "end-to-end points of vLLM, SGLang and TensorRT-LLM on H100, H200, B200 and GB200 (silicon/README.md, "
    "docs/accuracy.md)"
)

ASIC_BASIS = "estimate: the curves fitted on GPUs; no step of a chip of this class was measured"


def first_half(point: Point) -> bool:
    """Runs are dealt into halves whole, by a checksum of their configuration: no run is in both."""
    return zlib.crc32(point.run.encode()) % 2 == 0


ROUNDS = 2
"""Replay, fit, replay at what was found, fit again. More change nothing that shows."""


def main() -> None:
    curves, lines = kernel_curves()
    print("\n".join(lines))
    points = [point for point in read_points()[0] if fits(point) and not not_admitted(point)]
    start = parameters(curves)
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {what}", flush=True)

    full = {parameter.name: parameter.start for parameter in start}
    for _ in range(ROUNDS):
        queues = queues_of(points, full)
        full = fit_points(points, start, queues, initial=full)
        say(f"fitted on all {len(points)} points")
    full = rounded(full)
    save(full)
    # The parts begin where the whole did, not where it ended; only their points' queues are those of its last round.
    parts = {"half": [first_half(point) for point in points]}
    parts |= {chip: [point.chip != chip for point in points] for chip in FITTED_CHIPS}
    starts = {"half": start}
    for chip in FITTED_CHIPS:  # its kernels are left out too
        starts[chip] = parameters(kernel_curves(tuple(name for name in CHIPS if name != chip))[0])
    jobs = [
        (
            [point for point, kept in zip(points, keep, strict=True) if kept],
            starts[name],
            [queue for queue, kept in zip(queues, keep, strict=True) if kept],
        )
        for name, keep in parts.items()
    ]
    with ProcessPoolExecutor(PROCESSES) as pool:
        found = dict(zip(parts, pool.map(part, jobs), strict=True))
    say("fitted on one half, and without each chip")
    half = found.pop("half")
    fitted = {"kernels": curves, "kernel_lines": lines, "full": full, "half": half, "without": found}
    (TABLES / "fits.json").write_text(json.dumps(fitted, indent=1) + "\n")


def part(job: tuple[list[Point], list[Parameter], list[Queueing]]) -> dict[str, float]:
    points, start, queues = job
    return rounded(fit_points(points, start, queues, steps=PART_STEPS))


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def save(values: dict[str, float]) -> None:
    """The class of GPUs; and that of other chips with HBM and kernels, whose curves are the same for want of better."""
    gpu = efficiency(values, BASIS)
    asic = msgspec.structs.replace(
        gpu, name="asic", basis=ASIC_BASIS, measured=False, chips=(), overhead={"generic": gpu.overhead["generic"]}
    )
    for fitted in (gpu, asic):
        text = msgspec.json.format(msgspec.json.encode(fitted), indent=1)
        (PACKAGE / f"{fitted.name}.json").write_bytes(text + b"\n")


if __name__ == "__main__":
    main()
