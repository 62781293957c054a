"""Which tests may run beside each other: `scripts/test` runs the suite in two processes at once.

Tests that start processes of their own, and those that look at what the machine has left afterwards, stay together in
one of the two; they mostly wait. The other files go to whoever is free, those with slow tests first.
"""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for `--dist loadgroup`, in the order in which they are handed out."""
    order: dict[str, int] = {}
    for item in items:
        name = item.path.relative_to(TESTS).as_posix()
        together = name.startswith(START_PROCESSES)
        group = "processes" if together else name
        item.add_marker(pytest.mark.xdist_group(group))
        rank = 0 if together else 1 if item.get_closest_marker("slow") else 2
        order[group] = min(order.get(group, rank), rank)
    items.sort(key=lambda item: order[_group(item)])


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0])
