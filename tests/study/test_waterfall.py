from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from transload.runtime.base import Stage, Waterfall
from transload.study.waterfall import bar, decode_waterfalls, draw_waterfall

WATERFALL = Waterfall(
    request=5,  # type: ignore[arg-type]
    state="finished",
    decision="remote prefill: 0.12 s there, 0.30 s here",
    epoch=0,
    num_prompt_tokens=42,
    num_cached_tokens=16,
    num_outputs=9,
    total_seconds=1.0,
    stages=(
        Stage(name="queue", worker=None, start_seconds=0.0, seconds=0.25),
        Stage(name="prefill", worker="prefill-0", start_seconds=0.25, seconds=0.25, detail={"num_chunks": 2}),
        Stage(
            name="transfer",
            worker="decode-0",
            start_seconds=0.5,
            seconds=0.0,
            detail={"bytes": 2**20 * 3, "kept_bytes": 1024, "wire_seconds": 0.002, "transport": "shm"},
        ),
        Stage(name="decode", worker="decode-0", start_seconds=0.5, seconds=0.5),
    ),
)


def test_bars_lie_to_scale_where_their_stage_lies() -> None:
    assert bar(0.0, 0.25, 1.0, 8) == "██      "
    assert bar(0.25, 0.5, 1.0, 8) == "  ████  "
    assert bar(0.5, 0.5, 1.0, 8) == "    ████"
    assert bar(0.0, 1 / 16, 1.0, 8) == "▌       "


@pytest.mark.parametrize(("start", "seconds"), [(0.0, 1e-9), (0.999999, 1e-6), (0.5, 1e-9), (1.0, 0.5), (-0.1, 0.2)])
def test_a_stage_that_took_any_time_shows_and_the_bar_keeps_its_width(start: float, seconds: float) -> None:
    drawn = bar(start, seconds, 1.0, 10)
    assert len(drawn) == 10
    assert drawn.strip()


def test_a_stage_that_took_no_time_or_a_request_without_time_draws_nothing() -> None:
    assert bar(0.5, 0.0, 1.0, 4) == "    "
    assert bar(0.0, 1.0, 0.0, 4) == "    "


@pytest.mark.parametrize("key", ["choices", "requests"])
def test_the_servers_answer_is_read(key: str) -> None:
    body = msgspec.json.encode({"id": "chatcmpl-1", "object": "request", key: [WATERFALL, WATERFALL]})
    assert decode_waterfalls(body) == [WATERFALL, WATERFALL]


def test_a_drawing_names_each_stage_its_worker_its_time_and_its_details() -> None:
    screen = io.StringIO()
    draw_waterfall(WATERFALL, Console(file=screen, width=160))
    head, decision, *stages = screen.getvalue().splitlines()
    assert head == "42 prompt tokens (16 cached), 9 output tokens, 1.00 s, finished"
    assert decision == WATERFALL.decision
    assert [line.split()[0] for line in stages] == ["queue", "prefill", "transfer", "decode"]
    assert "prefill-0" in stages[1]
    assert "250 ms" in stages[1]
    assert "25%" in stages[1]
    assert "2 chunks" in stages[1]
    assert "3.00 MiB, kept 1.00 KiB, wire 2.00 ms, transport shm" in stages[2]
    assert stages[3].count("█") == 20


def test_on_a_narrow_screen_only_the_details_give_way() -> None:
    screen = io.StringIO()
    draw_waterfall(WATERFALL, Console(file=screen, width=80))
    lines = screen.getvalue().splitlines()
    for whole in ("queue", "prefill-0", "decode-0", "250 ms", "25%"):
        assert any(whole in line for line in lines)
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in screen.getvalue()
