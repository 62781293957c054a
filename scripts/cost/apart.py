"""Points that are reported apart, and by which evidence: that of the measurements, never our own error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from parameters import FORMATS
from points import Point
from served import load_of, worker_of

from transload.hardware.cost.efficiency import Collective, Curve, Efficiency, Overhead
from transload.hardware.cost.steady import decode_seconds

FASTER = 1.3
SHARED = 5


def light() -> Efficiency:
    """Every peak reached, every latency zero: no step without speculation can be faster."""
    perfect = Curve(compute=1.0, memory=1.0)
    free = Collective(base_seconds=0.0, share=1.0)
    return Efficiency(
        name="gpu", basis="speed of light", measured=False, gemm=dict.fromkeys(FORMATS, perfect),  # type: ignore[arg-type]
        grouped_gemm=dict.fromkeys(FORMATS, perfect), attention_prefill=perfect,  # type: ignore[arg-type]
        attention_decode=perfect, mla_prefill=perfect, mla_decode=perfect, elementwise=perfect, all_reduce=free,
        all_to_all=free, p2p=free,
        overhead={"generic": Overhead(step_seconds=0.0, layer_seconds=0.0, sequence_seconds=0.0)},
    )  # fmt: skip


def decoding_share(point: Point) -> float:
    """Share of a request's life that it decodes, by the measurement."""
    decoding = point.output_tokens * point.tpot
    return decoding / (decoding + point.ttft)


def not_admitted(point: Point) -> bool:
    """Requests spend most of their life waiting although their KV would fit: the server admits fewer than the stated
    concurrency, by a limit that is not stated, so the batch is unknown."""
    if point.mode != "agg" or decoding_share(point) >= 0.5:
        return False
    needed = point.concurrency / point.decode_workers * (point.prompt_tokens + point.output_tokens)
    return worker_of(point).kv_tokens >= needed


def beyond_light(points: Iterable[Point]) -> set[str]:
    """Ids of points whose TPOT is below what peak bandwidth and peak arithmetic allow a token a step, at the batch
    that decodes by the measurement itself."""
    perfect = light()
    found = set()
    for point in points:
        batch = max(1.0, point.concurrency / point.decode_workers * decoding_share(point))
        if point.tpot < decode_seconds(worker_of(point, perfect), load_of(point), batch):
            found.add(point.id)
    return found


def suspected_speculation(points: Sequence[Point]) -> set[str]:
    """Ids of points in runs that beat other builds of the same engine on the same chip, model, split and load by 1.3
    in the median of five loads or more: what multi-token prediction does, and tuning within months does not."""
    loads: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    members: dict[str, list[str]] = defaultdict(list)
    for point in points:
        fields = point.run.split("|")
        version, date = fields[2], fields[-1]
        build = "|".join((point.backend, point.chip, point.model, point.precision.experts, version, date, point.mode))
        model = "deepseek" if point.card.id == "deepseek-v3" else point.model
        load = (point.mode, point.backend, point.chip, model, point.precision, point.parallel,
                point.concurrency, point.prompt_tokens, point.output_tokens)  # fmt: skip
        loads[load][build] = min(point.tpot, loads[load].get(build, point.tpot))
        members[build].append(point.id)
    ratios: dict[str, list[float]] = defaultdict(list)
    for builds in loads.values():
        for build, tpot in builds.items():
            others = [other for name, other in builds.items() if name != build]
            if others:
                ratios[build].append(float(np.median(others)) / tpot)
    return {
        name
        for build, found in ratios.items()
        if len(found) >= SHARED and np.median(found) > FASTER
        for name in members[build]
    }
