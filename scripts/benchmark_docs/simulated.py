"""Virtual time: its speed, and how far it is from real runs."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmark_docs.layout import origin, table


def simulation(result: dict[str, Any]) -> str:
    rows = [_speed(figure, "plain") for figure in result["figures"]]
    rows += [_speed(figure, "compiled") for figure in result["compiled"]]
    stepped = result["step_by_step"]
    quarter, whole = (size / 1e6 for size in result["peak_memory_bytes"].values())
    heap = result["heap_events_per_cpu_second"]["median"] / 1e6
    text = (
        f"\n## Simulation\n\n`transload simulate`, {result['what']} (`benchmarks/simulation.yaml`), at the recorded "
        "speed and faster, and a made workload with longer outputs; the median of some runs on one core. *Compiled* is "
        "the copy that `scripts/compile.py` makes: the same modules, ahead of time, with "
        f"{'the same' if result['same_when_compiled'] else 'OTHER'} latencies to the bit. Beside it in the same run: a "
        f"bare loop of the event heap does {heap:.2f} M events a CPU second, going step by step is "
        f"{stepped['times_slower']:.1f} times slower with {'the same' if stepped['same_latencies'] else 'OTHER'} "
        f"latencies to the bit, and peak memory is {quarter:.0f} MB for a quarter of the requests, {whole:.0f} MB for "
        "all.\n\n"
    )
    columns = ["workload", "modules", "requests", "mean decode batch", "CPU seconds", "requests / CPU s"]
    text += table([*columns, "tokens / CPU s", "GPU hours / CPU s"], rows)
    text += "\nOther simulators, on other machines, so that only large ratios mean something:\n\n"
    peers: list[list[object]] = [
        [peer["name"], peer["what"], f"{peer['requests_per_cpu_second']:,g}", *_times(result, peer)]
        for peer in result["peers"]
    ]
    return text + table(["simulator", "of what", "requests / CPU s", "plain", "compiled"], peers) + origin(result)


def _speed(figure: dict[str, Any], modules: str) -> list[object]:
    return [
        figure["workload"],
        modules,
        f"{figure['requests']:,}",
        f"{figure['mean_decode_batch']:.0f}",
        f"{figure['cpu_seconds']['median']:.1f}",
        f"{figure['requests_per_cpu_second']['median']:,.0f}",
        f"{figure['output_tokens_per_cpu_second']['median']:,.0f}",
        f"{figure['gpu_hours_per_cpu_second']['median']:.1f}",
    ]


def _times(result: dict[str, Any], peer: dict[str, Any]) -> list[object]:
    """How many times as many requests the first workload has, plain and compiled."""
    rates = [figures[0]["requests_per_cpu_second"]["median"] if figures else None for figures in
             (result["figures"], result["compiled"])]  # fmt: skip
    times = [None if rate is None else rate / peer["requests_per_cpu_second"] for rate in rates]
    return ["" if each is None else f"{each:.0f}x" if each >= 10 else f"{each:.1f}x" for each in times]


def validation(result: dict[str, Any]) -> str:
    text = (
        "\n## Real against virtual\n\n`transload validate`: the same deployments and loads on this machine and in "
        "virtual time. Two simulations stand beside each real run, because there are two questions:\n\n"
        "- *Given its steps*: does the same control plane in virtual time give the latencies of the real system, if it "
        "is told how long steps take? For each worker, kind of step (with prompt tokens or without) and ten seconds "
        "one number is taken from the run's own steps: how many times as long they took as such steps took at "
        "calibration. Nothing of requests' latencies, throughput or stages goes into it. What is left to go wrong is "
        "queueing, batching, chunking, routing, handoff, the front end, and how workers slow each other.\n"
        "- *As calibrated*: the same with what was known of steps beforehand, scaled by the drift that was watched. "
        "How well a machine whose cores others share is known from minutes before is in this error too.\n\n"
        "Wanted: medians and throughput within 10 %, p90 within 20 %, of each stage that takes a twentieth of a "
        "request's time too; **bold** where it is not.\n\n"
    )
    return text + _validated(result)


def split_validation(result: dict[str, Any]) -> str:
    return "\n## Real against virtual: attention here, feed-forward there\n\nAs above.\n\n" + _validated(result)


def _validated(result: dict[str, Any]) -> str:
    chip, loads = result["chip"], _loads(result["comparisons"])
    text = (
        f"*Simulated* from what `transload calibrate` measured of this machine on {chip['date']}: {chip['model']}, "
        f"{chip['dtype']}, {chip['threads']} thread(s).\n\n"
    )
    if not result.get("follows_drift"):
        text += "Here drift was left out of what is as calibrated.\n\n"
    if result.get("simulated_commit", result["commit"]) != result["commit"]:
        text += f"Simulated anew by commit {result['simulated_commit'][:7]} from what had been measured before.\n\n"
    repeats = max(len(each) for each in loads.values())
    if repeats > 1:
        text += (
            f"Everything was played {repeats} times, in turn, each time with other requests: the median of what was "
            "measured, and of the errors, with the smallest and the largest.\n\n"
        )
    text += _verdict(loads)
    rows = [row for (deployment, load), each in loads.items() for row in _rows(deployment, load, each)]
    columns = ["deployment", "load", "figure", "measured", "error given its steps", "error as calibrated"]
    text += table(columns, rows)
    text += "\nHow many times as long steps took as at calibration (least and most of ten seconds), and the drift:\n\n"
    text += table(
        ["deployment", "load", "steps", "drift"], [_speeds(*key, one) for key, each in loads.items() for one in each]
    )
    text += "\nMean seconds a request spends in each stage, measured / *given its steps* / *as calibrated*:\n\n"
    text += table(["deployment", "load", "stages"], [_stages(*key, one) for key, each in loads.items() for one in each])
    return text + origin(result)


Loads = dict[tuple[str, str], list[dict[str, Any]]]


def _loads(comparisons: list[dict[str, Any]]) -> Loads:
    """By deployment and load, the repeats of each."""
    found: Loads = {}
    for comparison in comparisons:
        found.setdefault((comparison["deployment"], comparison["load"]), []).append(_of_today(comparison))
    return found


def _of_today(comparison: dict[str, Any]) -> dict[str, Any]:
    """Results of before 2026-11-26 22:00 hold one simulation, which was not given the run's steps."""
    if "speeds" in comparison:
        return comparison
    figures, stages = (
        [figure | {"as_calibrated": figure["simulated"]} for figure in comparison[part]]
        for part in ("figures", "stages")
    )
    return comparison | {"figures": figures, "stages": stages, "speeds": []}


def _bounded(repeats: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Figures with a bound, by their name, over all repeats."""
    found: dict[str, list[dict[str, Any]]] = {}
    for comparison in repeats:
        for figure in (*comparison["figures"], *comparison["stages"]):
            if figure["within"] and figure["measured"]:
                found.setdefault(figure["name"], []).append(figure)
    return found


def _errors(figures: list[dict[str, Any]], side: str) -> list[float]:
    return [figure[side] / figure["measured"] - 1 for figure in figures if side in figure]


SIDES = {"given_steps": "given its steps", "as_calibrated": "as calibrated"}


def _verdict(loads: Loads) -> str:
    """How many figures hold, and the largest of the typical errors."""
    told: list[str] = []
    for side, words in SIDES.items():
        typical = [
            (median(errors), figures[0]["within"])
            for each in loads.values()
            for figures in _bounded(each).values()
            if (errors := _errors(figures, side))
        ]
        if typical:
            held = sum(abs(error) <= within for error, within in typical)
            worst = max(typical, key=lambda each: abs(each[0]))[0]
            told.append(f"{words} {held} of {len(typical)} figures are within their bounds, the worst is {worst:+.0%}")
    return f"*Simulated* {'; '.join(told)}.\n\n"


def _rows(deployment: str, load: str, repeats: list[dict[str, Any]]) -> list[list[object]]:
    rates = sorted({f"{each['requests_per_second']:.2f}" for each in repeats})
    rate = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
    rows: list[list[object]] = []
    for name, figures in _bounded(repeats).items():
        in_seconds = figures[0]["unit"] == "s"
        measured = median(figure["measured"] for figure in figures) * (1e3 if in_seconds else 1)
        rows.append(
            [
                deployment,
                f"{load} ({rate}/s)",
                f"{name}, ms" if in_seconds else name,
                f"{measured:.4g}",
                *(_told(_errors(figures, side), figures[0]["within"]) for side in SIDES),
            ]
        )
    return rows


def _told(errors: list[float], within: float) -> str:
    if not errors:
        return ""
    typical = f"{median(errors):+.1%}"
    if abs(median(errors)) > within:
        typical = f"**{typical}**"
    return typical if len(errors) == 1 else f"{typical} ({min(errors):+.0%} to {max(errors):+.0%})"


def _speeds(deployment: str, load: str, comparison: dict[str, Any]) -> list[object]:
    told = [
        f"{speed['worker']} {speed['kind']} {speed['times']:.2f} ({min(speed['by_window']):.2f} to "
        f"{max(speed['by_window']):.2f})"
        for speed in comparison["speeds"]
    ]
    drift = comparison.get("drift")
    return [deployment, load, "; ".join(told), "" if drift is None else f"{drift['prefill']:.2f}"]


def _stages(deployment: str, load: str, comparison: dict[str, Any]) -> list[object]:
    """Those that take a hundredth of a second or more."""
    told = [
        f"{figure['name']} {' / '.join(f'{figure[side]:.2f}' for side in ('measured', *SIDES) if side in figure)}"
        for figure in comparison["stages"]
        if figure["within"] is None and max(figure["measured"], figure["as_calibrated"]) >= 0.01
    ]
    return [deployment, load, "; ".join(told)]
