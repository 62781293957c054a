"""Runs the settings of claims and has them judged. Every record of the file gets a finding, none is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from transload.errors import TransloadError
from transload.study.claims.record import Figure, Record, records
from transload.study.claims.setting import Answer, Setting
from transload.study.claims.settings import SETTINGS
from transload.study.claims.verdict import Finding, judge_record

Report = Callable[[str], None]
"""Told the id of each claim before its setting is simulated."""


def evaluate(
    chosen: Iterable[Record] | None = None,
    settings: Mapping[str, Setting] = SETTINGS,
    report: Report = lambda _claim_id: None,
) -> list[Finding]:
    """Findings for these records, all of the file by default."""
    findings: list[Finding] = []
    for record in records().values() if chosen is None else chosen:
        setting = settings.get(record.id)
        if setting is None:
            findings.append(judge_record(record, {}))
            continue
        report(record.id)
        findings.append(_judged(record, setting))
    return findings


def _judged(record: Record, setting: Setting) -> Finding:
    """A setting that the model refuses makes its figures not checkable, with the refusal as what is missing."""
    try:
        answer: Answer = setting()
    except TransloadError as refusal:
        figures = tuple(_without(figure, str(refusal)) for figure in record.figures)
        return judge_record(msgspec.structs.replace(record, figures=figures), {})
    return judge_record(record, answer.values, answer.assumptions, answer.basis)


def _without(figure: Figure, refusal: str) -> Figure:
    return figure if figure.missing else msgspec.structs.replace(figure, missing=f"the model refuses it: {refusal}")
