"""What the cost model itself costs: microseconds a warm decode step, a mixed step, and to set up a worker.

python benchmarks/cost_model.py [--calls 20000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from transload.hardware.catalog import load_chip, load_model
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.parallel import Parallel

WORKERS = (
    ("h100", "llama-3.1-8b", Parallel()),
    ("b200", "llama-3.1-70b", Parallel(tensor=8)),
    ("gb200", "deepseek-v3", Parallel(data_attention=16, expert=16)),
    ("b200", "gpt-oss-120b", Parallel(tensor=2)),
)


def microseconds(call: Callable[[int], object], calls: int) -> float:
    """CPU time a call, best of three rounds."""
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for index in range(calls):
            call(index)
        best = min(best, time.process_time() - began)
    return best / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    calls = parser.parse_args().calls
    print(f"{'worker':<34} {'decode us':>10} {'mixed us':>10} {'set-up us':>10}")
    for chip_name, model, parallel in WORKERS:
        chip, card = load_chip(chip_name), load_model(model)
        cost = WorkerCost(chip, card, parallel)
        decode = microseconds(lambda index, cost=cost: cost.decode_coefficients(index % 256 + 1), calls)  # type: ignore[misc]
        shapes = [StepShape(((0, 512 + index),), index % 256 + 1, 1000 * index) for index in range(1, 1025)]
        mixed = microseconds(
            lambda index, cost=cost, shapes=shapes: cost.step_seconds(shapes[index % 1024]),  # type: ignore[misc]
            calls // 4,
        )
        made = microseconds(
            lambda _, chip=chip, card=card, parallel=parallel: WorkerCost(chip, card, parallel),  # type: ignore[misc]
            calls // 50,
        )
        print(f"{chip_name + ' ' + model:<34} {decode:>10.2f} {mixed:>10.2f} {made:>10.1f}")


if __name__ == "__main__":
    main()
