"""Which tests may run beside each other: `scripts/test` runs the suite in two processes at once.

Tests that start processes of their own, and those that look at what the machine has left afterwards, stay together in
one of the two; they mostly wait. The other files go to whoever is free, those with slow tests first.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
START_PROCESSES = (
    "e2e",
    "transfer",
    "study/validate",
    "study/calibrate",
    "study/test_bench.py",
    "study/test_chat.py",
    "study/test_report_browser.py",
)


def group_of(path: str) -> str:
    """Which tests stay together, by a path below this folder."""
    return "processes" if path.startswith(START_PROCESSES) else path


class Groups(LoadScopeScheduling):  # type: ignore[misc]
    """A group goes to one of the test processes as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0].removeprefix("tests/"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """Whatever `--dist` says."""
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order in which they are handed out."""
    order: dict[str, int] = {}
    groups = [group_of(item.path.relative_to(TESTS).as_posix()) for item in items]
    for item, group in zip(items, groups, strict=True):
        rank = 0 if group == "processes" else 1 if item.get_closest_marker("slow") else 2
        order[group] = min(order.get(group, rank), rank)
    places = sorted(range(len(items)), key=lambda place: order[groups[place]])
    items[:] = [items[place] for place in places]
