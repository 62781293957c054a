"""Writes docs/claims.md: simulates the settings of all published claims and lays them beside the model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transload.study.claims.evaluate import evaluate
from transload.study.claims.show import (
    LEGEND,
    counts_words,
    error_words,
    leading_figure,
    setup_words,
    simulated_words,
    verdict_words,
    why_words,
)
from transload.study.claims.verdict import Finding

TARGET = Path(__file__).parent.parent / "docs" / "claims.md"
INTRO = """\
# Published claims, and what the model says of them

<!-- Written by scripts/make_claims_docs.py. Do not edit by hand. -->

Every claim of the founding article, and the publications behind it, with its setting simulated by the cost model
(`src/transload/hardware/cost`) or the virtual runtime. The settings know no claimed value: their numbers are the
publication's, the catalog's or an assumption that is listed. No constant is fitted on a claim, and a test holds that
changing what is claimed changes no simulated value.

{legend}

```
transload claims                      all of them, one line each
transload claims lpx.35x              one, figure by figure, with what it rests on
transload claims --json               everything, for programs
scripts/make_claims_docs.py           writes this page anew
```
"""


def page() -> str:
    """The whole page."""
    findings = evaluate()
    return "\n".join([INTRO.format(legend=LEGEND), *_overview(findings), "", *_details(findings)]) + "\n"


def _overview(findings: list[Finding]) -> Iterator[str]:
    verdicts = Counter(finding.verdict for finding in findings)
    figures = [sum(finding.counts()[index] for finding in findings) for index in range(3)]
    yield (
        f"{len(findings)} claims: {verdicts['reproduced']} reproduced, {verdicts['in part']} in part, "
        f"{verdicts['does not follow']} do not follow, {verdicts['not checkable']} not checkable. {sum(figures)} "
        f"figures: {figures[0]} reproduced, {figures[1]} do not follow, {figures[2]} not checkable."
    )
    yield ""
    yield "| claim | claimed | simulated | error | figures | verdict |"
    yield "|---|---|---|---|---|---|"
    for finding in findings:
        shown = leading_figure(finding)
        yield _row(
            f"[{finding.record.id}](#{_anchor(finding.record.id)}): {finding.record.title}",
            f"{shown.metric}: {shown.claimed} {shown.unit}",
            simulated_words(shown),
            error_words(shown),
            counts_words(finding),
            verdict_words(finding),
        )


def _details(findings: list[Finding]) -> Iterator[str]:
    for finding in findings:
        record = finding.record
        yield f"## {record.id}"
        yield ""
        yield f"**{record.title}**. {record.kind}; {record.source}; read with {record.confidence} confidence."
        yield ""
        setup = "; ".join(f"{name}: {setup_words(value)}" for name, value in record.setup.items())
        yield f"Setting: {setup}. {record.note}".strip()
        yield ""
        if finding.basis:
            yield f"Simulated: {finding.basis}."
            yield ""
        yield "| figure | claimed | simulated (interval) | error | verdict | why |"
        yield "|---|---|---|---|---|---|"
        for figure in finding.figures:
            yield _row(
                figure.metric,
                f"{figure.claimed} {figure.unit}",
                simulated_words(figure, with_interval=True),
                error_words(figure),
                figure.verdict,
                why_words(figure),
            )
        yield ""
        for assumption in finding.assumptions:
            yield f"- {assumption}"
        if finding.assumptions:
            yield ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/").strip() for cell in cells) + " |"


def _anchor(heading: str) -> str:
    """As GitHub makes it: dots go, the rest stays."""
    return heading.replace(".", "")


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET}")
