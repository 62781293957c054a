"""A fit to end-to-end points: queues from a replay, and parameters by robust least squares on logarithms, in turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from least_squares import Parameter, Rows, Vector, fit
from parameters import efficiency
from points import Point
from served import Queueing, queueing_of, scaled

from transload.hardware.model_card import Mla

STEPS = 4
SCALE = 0.12
"""Errors beyond about this pull with their size only."""
TTFT_SCALE = 0.3
TTFT_WEIGHT = 0.5
"""TTFT is less of the chip and more of the client than TPOT."""


def queues_of(points: Sequence[Point], values: dict[str, float]) -> list[Queueing]:
    """What the load makes of each point's bare costs at these parameters."""
    now = efficiency(values)
    return [queueing_of(point, now) for point in points]


def fit_points(
    points: Sequence[Point], parameters: list[Parameter], queues: Sequence[Queueing], *,
    initial: dict[str, float] | None = None, steps: int = STEPS,
) -> dict[str, float]:  # fmt: skip
    """Parameters for these points, their queues as they are."""
    count = len(points)
    measured = np.log([[point.tpot for point in points], [point.ttft for point in points]])

    def log_errors(tried: dict[str, float], rows: Rows) -> Vector:
        guess = efficiency(tried)
        chosen = range(count) if rows is None else rows[: len(rows) // 2]
        served = [scaled(points[place], guess, queues[place]) for place in chosen]
        tpot = np.log([one.tpot for one in served]) - measured[0, list(chosen)]
        ttft = np.log([one.ttft for one in served]) - measured[1, list(chosen)]
        return np.concatenate([tpot, ttft * (SCALE / TTFT_SCALE)])

    def rows_of(name: str) -> Rows:
        touched = np.array([place for place, point in enumerate(points) if touches(name, point)], dtype=np.int64)
        return np.concatenate([touched, touched + count])

    weights = np.concatenate([np.ones(count), np.full(count, TTFT_WEIGHT)])
    return fit(parameters, log_errors, rows_of=rows_of, scale=SCALE, steps=steps, weights=weights, initial=initial)


def touches(name: str, point: Point) -> bool:
    """Whether a point's durations depend on the parameter at all."""
    kind, _, detail = name.partition(".")
    precision, sparse = point.precision, point.card.experts is not None
    stored = {
        precision.attention,
        precision.dense_ffn,
        precision.embeddings,
        precision.experts if sparse else "bfloat16",
    }
    splits = [point.parallel, point.prefill_parallel or point.parallel]
    latent = isinstance(point.card.attention, Mla)
    match kind:
        case "gemm":
            wanted = {"bf16": "bfloat16", "fp8": "fp8", "fp4": "nvfp4"}[detail.partition(".")[0]]
            return wanted in stored
        case "grouped":
            wanted = {"bf16": "bfloat16", "fp8": "fp8", "fp4": "nvfp4"}.get(detail.partition(".")[0], "mxfp4")
            if detail.startswith("fp8_dealt"):
                return precision.experts == "fp8" and any(split.data_attention > 8 for split in splits)
            wide = point.chip in ("h100_sxm", "h200_sxm")
            if detail.startswith("mxfp4") and detail.startswith("mxfp4_wide") is not wide:
                return False
            return sparse and (detail == "floor" or precision.experts == wanted)
        case "attention_prefill" | "attention_decode":
            return not latent
        case "mla_prefill" | "mla_decode" | "mla":
            return latent
        case "all_reduce":
            return any(split.tensor > 1 for split in splits)
        case "all_to_all":
            return any(split.data_attention > 1 for split in splits)
        case "trtllm" | "vllm" | "sglang":
            return point.backend == kind
        case _:
            return True
