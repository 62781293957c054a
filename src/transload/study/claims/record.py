"""What has been claimed: records of `records.yaml`, read and checked.

Owns the claims as published. What is simulated never looks in here, so that no claimed value can reach it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from transload.errors import DeploymentError
from transload.hardware.nearest import did_you_mean
from transload.hardware.quantity import Confidence, Slug, Text
from transload.hardware.read import read_struct, read_text

FILE = Path(__file__).with_name("records.yaml")
Relation = Literal["equal", "within", "range", "at most", "at least", "up to"]
"""equal: the value itself. within: somewhere between `value` and `high`. range: settings that are not told give
anything from `value` to `high`. up to: some setting reaches it."""
Key = Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,40}$")]


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number that was claimed."""

    key: Key
    metric: Text
    value: float | None = None
    high: float | None = None
    """The upper end, for `within` and `range`."""
    unit: str = ""
    relation: Relation = "equal"
    words: str = ""
    """A claim without a number."""
    missing: str = ""
    """What it would take to check it. Empty: it is checked."""
    doubt: str = ""
    """What it hangs on, where it does not follow."""
    fitted: bool = False
    """The cost model's constants were fitted on this very measurement."""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.words == ""):
            raise ValueError(f"{self.key}: wanted either a value or words")
        if (self.high is not None) != (self.relation in ("within", "range")):
            raise ValueError(f"{self.key}: within and range need `high`, and nothing else has it")
        if self.value is None and not self.missing:
            raise ValueError(f"{self.key}: words cannot be checked; say what is missing")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One publication's claim about one setting."""

    id: Slug
    title: Text
    kind: Text
    source: Text
    confidence: Confidence
    """In our reading of it, not in what it says."""
    setup: dict[str, str | float]
    note: str = ""
    doubt: str = ""
    """What those figures hang on, if they do not follow, that say nothing of their own."""
    figures: Annotated[tuple[Figure, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        keys = [figure.key for figure in self.figures]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"{self.id}: the key {twice[0]} stands twice")


class _Records(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    records: tuple[Record, ...]


@cache
def records() -> dict[str, Record]:
    """All claims by id, in the order of the file. Raises `DeploymentError`."""
    found = read_struct(read_text(FILE), str(FILE), _Records).records
    return {record.id: record for record in found}


def record(claim_id: str) -> Record:
    """One claim. Raises `DeploymentError`."""
    known = records()
    if claim_id not in known:
        raise DeploymentError(
            f"no such claim: {claim_id}{did_you_mean(claim_id, list(known))}; `transload claims` lists them"
        )
    return known[claim_id]
