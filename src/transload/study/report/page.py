"""One or several results as one HTML page that needs no network: data, style and script are all in it.

Owns what goes into the page; `page.js` lays it out and `chart.js` draws. Simulated and measured results come alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import msgspec

from transload import __version__
from transload.errors import DeploymentError
from transload.study.curves import latency_curves
from transload.study.metrics import Distribution, Summary
from transload.study.result import Result
from transload.study.significant import significant

SIGNIFICANT = 6
MIN_SWEEP_POINTS = 3


def write_page(results: Sequence[Result], path: str | Path, *, title: str = "Transload report") -> None:
    """Raises `DeploymentError` if the file cannot be written."""
    try:
        Path(path).write_text(render_page(results, title=title), encoding="utf-8")
    except OSError as problem:
        raise DeploymentError(f"{path}: cannot write the page: {problem.strerror}") from None


def render_page(results: Sequence[Result], *, title: str = "Transload report") -> str:
    """The page. `results` holds at least one; several are laid side by side."""
    assert results, "a page shows at least one result"
    labels = result_labels(results)
    data = {
        "title": _short(title),
        "version": __version__,
        "results": [_result(result, label) for result, label in zip(results, labels, strict=True)],
        "sweeps": _sweeps(results),
    }
    # "</script>" in a name must not end the script that holds it.
    encoded = msgspec.json.encode(significant(data, SIGNIFICANT)).decode().replace("<", "\\u003c")
    parts = {
        "title": escape(labels[0] if len(results) == 1 else _short(title)),
        "style": _asset("page.css"),
        "script": _asset("chart.js") + _asset("page.js").replace('"use strict";\n', "", 1),
        "data": encoded,
    }
    page = _asset("page.html")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text, 1)
    return page


def _asset(name: str) -> str:
    return (files("transload.study.report") / name).read_text(encoding="utf-8")


def _result(result: Result, label: str) -> dict[str, Any]:
    """What the page shows of a result: all of it but what grows with the trace."""
    shown = msgspec.structs.replace(result, requests=None, steps=None, curves={})
    built: dict[str, Any] = msgspec.to_builtins(shown)
    built["label"] = label
    built["curves"] = _curves(result)
    return built


def _curves(result: Result) -> dict[str, list[tuple[float, float]]]:
    """(share, seconds) points of each latency's distribution: from the requests, or else from what was summed up."""
    curves = result.curves or (latency_curves(result.requests) if result.requests else {})
    if curves:
        return {name: _points(values, in_bins=name == "itl") for name, values in curves.items() if len(values) > 1}
    summary = result.summary
    latencies = {
        "ttft": summary.ttft_seconds,
        "tpot": summary.tpot_seconds,
        "itl": summary.itl_seconds,
        "end_to_end": summary.end_to_end_seconds,
    }
    return {name: _percentiles(values) for name, values in latencies.items() if values is not None}


def _points(values: Sequence[float], *, in_bins: bool) -> list[tuple[float, float]]:
    """`in_bins`: gaps between tokens are counted in bins by simulations, whose edges alone are true."""
    points = [(index / (len(values) - 1), value) for index, value in enumerate(values)]
    if not in_bins:
        return points
    edges = [point for point, after in pairwise(points) if point[1] != after[1]]
    return [points[0], *(edge for edge in edges if edge[0] > 0), points[-1]]


def _percentiles(values: Distribution) -> list[tuple[float, float]]:
    return [(0.5, values.p50), (0.9, values.p90), (0.95, values.p95), (0.99, values.p99), (1.0, values.max)]


def result_labels(results: Sequence[Result]) -> list[str]:
    """Names that tell the results apart: by rate where the name alone does not, by number where nothing does."""
    names = [_short(result.name) for result in results]
    for tell_apart in (_kind_of, _rate_of):
        counts = Counter(names)
        names = [
            f"{name}{tell_apart(result)}" if counts[name] > 1 else name
            for name, result in zip(names, results, strict=True)
        ]
    counts = Counter(names)
    return [f"{name} #{index}" if counts[name] > 1 else name for index, name in enumerate(names, 1)]


def _kind_of(result: Result) -> str:
    return "" if result.simulated else ", real"


def _rate_of(result: Result) -> str:
    rate = result.summary.offered_requests_per_second
    return "" if rate is None else f" @ {rate:.3g}/s"


def _short(name: str) -> str:
    """A file's name without its folder and ending."""
    return re.sub(r"(?:[^\s,]*/)?([^\s,/]+)\.ya?ml\b", r"\1", name)


def _sweeps(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Runs of one deployment at several offered rates, as curves over the rate."""
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        if result.summary.offered_requests_per_second is not None:
            groups.setdefault((result.deployment or result.model, result.simulated), []).append(result)
    return [
        {
            "name": _common_name(group),
            "simulated": simulated,
            "has_targets": any(result.summary.meets_targets is not None for result in group),
            "points": [_point(summary) for summary in sorted((result.summary for result in group), key=_offered)],
        }
        for (_, simulated), group in groups.items()
        if len({result.summary.offered_requests_per_second for result in group}) >= MIN_SWEEP_POINTS
    ]


def _common_name(group: Sequence[Result]) -> str:
    """What the names begin with, less a rate that follows; the model's where that is nothing."""
    names = [_short(result.name) for result in group]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same)
    if len(set(names)) > 1:
        common = re.sub(r"[\s,.@_-]*(?:rate\s*)?[\d.]*$", "", common)
    return common or group[0].model


def _offered(summary: Summary) -> float:
    return summary.offered_requests_per_second or 0.0


def _point(summary: Summary) -> dict[str, float | None]:
    has_targets = summary.meets_targets is not None
    return {
        "offered": summary.offered_requests_per_second,
        "goodput": summary.goodput_requests_per_second if has_targets else None,
        "attainment": summary.attainment if has_targets else None,
        "output_tokens": summary.output_tokens_per_second,
        "ttft_p90": summary.ttft_seconds.p90 if summary.ttft_seconds else None,
        "tpot_p90": summary.tpot_seconds.p90 if summary.tpot_seconds else None,
    }
