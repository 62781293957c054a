"""Writes docs/article.md: the article's systems side by side, simulated on recorded traffic, each at its own limit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from transload.deploy.load import load
from transload.deploy.spec import Deployment
from transload.study.compare import Comparison, compare
from transload.study.result import Result
from transload.study.saturation import saturate
from transload.study.show_compare import LINES
from transload.study.simulate import simulate
from transload.study.traces import Window, find_trace, open_trace
from transload.study.workload import Workload

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "article.md"
SYSTEMS = ("b200-aggregated", "b200-pd", "cpx-r200", "trainium-cs3", "gpu-sn50", "rubin-lpx")
REQUESTS = 1000
SHORTER = 400
"""Requests of a run of which each system needs about ten."""
INTRO = f"""\
# The article's systems, side by side

<!-- Written by scripts/make_article_docs.py. Do not edit by hand. -->

Six ways to serve Llama-3.1-70B, *simulated* by the control plane that serves real requests, on chips of the catalog.
The traffic is the beginning of the Azure conversation trace of 2023 ([traces](../traces/README.md)). Chips, links,
splits and every assumption stand in `deployments/*.yaml`; the published numbers that these systems are known by, and
what the model says of them, are in [claims.md](claims.md).

Prices are estimates or assumptions throughout, so a dollar tells the order of magnitude. In brackets: where 80 % of
measured values of chips known as well lay. What the model does not see: the ecosystem, the supply, the work of running
two kinds of machine.

```
transload compare deployments/{{{",".join(SYSTEMS)}}}.yaml --trace conversation --requests {REQUESTS}
transload compare ... --requests {SHORTER} --saturate
transload explain deployments/trainium-cs3.yaml         one of them: what fits, what crosses, what is assumed
scripts/make_article_docs.py                            writes this page anew
```
"""


def page() -> str:
    """The whole page."""
    deployments = [(name, load(ROOT / "deployments" / f"{name}.yaml")) for name in SYSTEMS]
    trace = _trace(REQUESTS)
    at_once = compare(
        [(deployment, _play(trace, deployment, name)) for name, deployment in deployments], workload=trace.name
    )
    parts = [
        INTRO,
        f"## At the trace's own rate\n\nThe first {REQUESTS:,} requests, as they came.\n",
        *_table(at_once),
        "",
        f"## Each at its own limit\n\nThe first {SHORTER} requests, faster and faster, until TTFT within 1 s and TPOT "
        "within 30 ms no longer hold for 95 %.\n",
        *_table(_saturated(deployments)),
        "",
        "## Assumed",
        "",
        *(f"- `{assumption}`" for assumption in _assumed(at_once)),
    ]
    return "\n".join(parts) + "\n"


def _trace(num_requests: int) -> Workload:
    return open_trace(find_trace("conversation"), "auto", Window(max_requests=num_requests))


def _play(workload: Workload, deployment: Deployment, name: str) -> Result:
    return simulate(deployment, workload, name=name)


def _saturated(deployments: list[tuple[str, Deployment]]) -> Comparison:
    workload = _trace(SHORTER)
    pairs: list[tuple[Deployment, Result]] = []
    factors: list[float] = []
    for name, deployment in deployments:
        found = saturate(workload, partial(_play, deployment=deployment, name=name))
        pairs.append((deployment, found.result or _play(workload, deployment, name)))
        factors.append(found.factor)
    return compare(pairs, workload=workload.name, factors=factors)


def _table(comparison: Comparison) -> Iterator[str]:
    yield "| | " + " | ".join(row.name for row in comparison.rows) + " |"
    yield "|---|" + "---|" * len(comparison.rows)
    for name, words in LINES:
        yield f"| {name} | " + " | ".join(words(row).replace("|", "/") for row in comparison.rows) + " |"
    yield ""
    for verdict in comparison.verdicts:
        yield f"- {verdict}"


def _assumed(comparison: Comparison) -> dict[str, None]:
    return dict.fromkeys(assumption for row in comparison.rows for assumption in row.assumptions)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
