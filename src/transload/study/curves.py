"""Distributions of latencies as curves of fixed size: what a chart needs, whatever the number of requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from transload.study.metrics import RequestRecord, tpot_seconds, ttft_seconds

NUM_POINTS = 201
"""Values at shares 0, 0.005, ..., 1 of those in order."""


def curve(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, ...]:
    """The values at `NUM_POINTS` evenly spaced shares, the least and the greatest among them; () of no values."""
    if len(values) == 0:
        return ()
    shares = np.linspace(0.0, 1.0, NUM_POINTS)
    return tuple(float(value) for value in np.quantile(np.asarray(values, dtype=np.float64), shares))


def latency_curves(records: Iterable[RequestRecord]) -> dict[str, tuple[float, ...]]:
    """Curves of `ttft`, `tpot`, `itl` and `end_to_end` in seconds, of the successful requests; those without a value
    are left out."""
    successful = [record for record in records if record.error is None and not record.interrupted]
    gaps = [np.diff(np.asarray(record.token_seconds)) for record in successful if len(record.token_seconds) > 1]
    curves = {
        "ttft": curve([value for record in successful if (value := ttft_seconds(record)) is not None]),
        "tpot": curve([value for record in successful if (value := tpot_seconds(record)) is not None]),
        "itl": curve(np.concatenate(gaps)) if gaps else (),
        "end_to_end": curve([record.end_seconds - record.due_seconds for record in successful]),
    }
    return {name: values for name, values in curves.items() if values}
