from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.study.scripted_server import Call, Script, answer_in_full, scripted_server
from transload.errors import DeploymentError
from transload.study.http_client import HttpClient, parse_url
from transload.study.loadgen import LoadGenerator
from transload.study.metrics import RequestRecord, summarize
from transload.study.prompts import Vocabulary
from transload.study.target import Target
from transload.study.traces import open_trace
from transload.study.workload import ArrivalSpec, Workload

TARGET = Target(model="m", vocabulary=Vocabulary(tuple(range(100, 900))))


def workload_of(arrivals: Sequence[ArrivalSpec], **fields: Any) -> Workload:
    return Workload(name="test", arrivals=lambda: iter(arrivals), **fields)


def at_once(count: int, num_output_tokens: int = 3) -> Workload:
    return workload_of([ArrivalSpec(0.0, 20, num_output_tokens) for _ in range(count)])


def play(
    script: Script,
    workload: Workload,
    *,
    target: Target = TARGET,
    timeout_seconds: float = 60.0,
    meanwhile: Callable[[LoadGenerator], Coroutine[None, None, None]] | None = None,
) -> list[RequestRecord]:
    async def main() -> list[RequestRecord]:
        async with scripted_server(script) as url:
            client = HttpClient(parse_url(url))
            generator = LoadGenerator(client, target, workload, timeout_seconds=timeout_seconds)
            other = asyncio.create_task(meanwhile(generator)) if meanwhile is not None else None
            try:
                records = await generator.run()
                if other is not None:
                    await other
                assert generator.progress.num_in_flight == 0
                assert not generator._tasks
                return records
            finally:
                await client.close()

    return asyncio.run(main())


def kinds(records: list[RequestRecord]) -> list[str | None]:
    return [record.error for record in records]


def test_every_arrival_is_sent_once_and_answered_with_all_its_tokens() -> None:
    bodies: list[Any] = []

    async def script(call: Call) -> None:
        bodies.append(call.fields)
        await answer_in_full(call)

    arrivals = [ArrivalSpec(0.001 * n, 10 + n, 1 + n % 4) for n in range(30)]
    records = play(script, workload_of(arrivals))
    assert [r.index for r in records] == list(range(30))
    assert kinds(records) == [None] * 30
    assert [len(r.token_seconds) for r in records] == [a.num_output_tokens for a in arrivals]
    assert [r.num_input_tokens for r in records] == [a.num_input_tokens for a in arrivals]
    assert [r.due_seconds for r in records] == [a.at_seconds for a in arrivals]
    for record in records:
        assert record.due_seconds <= record.start_seconds <= record.token_seconds[0]
        assert record.token_seconds == sorted(record.token_seconds)
        assert record.token_seconds[-1] <= record.end_seconds
    assert sorted(len(body["prompt"]) for body in bodies) == list(range(10, 40))
    wanted = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    assert all(wanted.items() <= body.items() for body in bodies)


def test_in_open_loop_a_server_that_answers_nothing_does_not_delay_what_comes_next() -> None:
    waiting: list[Call] = []
    all_here = asyncio.Event()

    async def script(call: Call) -> None:
        waiting.append(call)
        if len(waiting) == 40:
            all_here.set()  # only if each came without an answer to those before it is this ever reached
        await all_here.wait()
        await answer_in_full(call)

    records = play(script, workload_of([ArrivalSpec(0.001 * n, 8, 2) for n in range(40)]))
    assert kinds(records) == [None] * 40
    assert summarize(records).peak_in_flight == 40


def test_a_closed_loop_never_has_more_than_its_number_at_once() -> None:
    now = most = 0

    async def script(call: Call) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        await answer_in_full(call)

    workload = workload_of([ArrivalSpec(0.0, 8, 2) for _ in range(25)], concurrency=3)
    assert kinds(play(script, workload)) == [None] * 25
    assert most == 3


def test_a_sessions_next_turn_comes_after_the_answer_to_the_last_and_repeats_its_prompt() -> None:
    prompts: list[list[int]] = []

    async def script(call: Call) -> None:
        prompts.append(call.fields["prompt"])
        await answer_in_full(call)

    turns = [
        ArrivalSpec(0.0, 20, 4, (1, 2), 0, 0),
        ArrivalSpec(0.0, 40, 4, (1, 2, 3), 0, 1, 0.01),
        ArrivalSpec(0.0, 60, 4, (1, 2, 3, 4), 0, 2, 0.0),
    ]
    records = play(script, workload_of(turns, block_size=16))
    assert [len(p) for p in prompts] == [20, 40, 60]
    assert prompts[1][:20] == prompts[0]
    assert prompts[2][:40] == prompts[1]
    assert records[1].due_seconds >= records[0].end_seconds + 0.01
    assert records[2].due_seconds >= records[1].end_seconds


async def refuse(call: Call) -> None:
    await call.json(429, {"error": {"message": "over capacity"}})


async def fail_in_stream(call: Call) -> None:
    await call.stream()
    await call.text("a")
    await call.event({"error": {"message": "worker lost", "code": "worker_lost"}})
    await call.done()


async def end_without_done(call: Call) -> None:
    await call.stream()
    await call.text("a")
    await call.end()


async def hang_up_in_the_middle(call: Call) -> None:
    await call.stream()
    await call.text("a")
    call.hang_up()


async def hang_up_at_once(call: Call) -> None:
    call.hang_up()


async def say_nothing(call: Call) -> None:
    await call.stream()
    await call.done()


async def speak_something_else(call: Call) -> None:
    await call.raw(b"220 mail.example.com ESMTP\r\n\r\n")


async def not_stream(call: Call) -> None:
    await call.json(200, {"choices": [{"text": "all at once"}]})


async def never_answer(call: Call) -> None:
    await asyncio.sleep(3600)


async def stop_in_the_middle(call: Call) -> None:
    await call.stream()
    await call.text("a")
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (refuse, "http_status", "429: over capacity"),
        (fail_in_stream, "error_event", "worker lost"),
        (end_without_done, "truncated", "the stream ended without [DONE]"),
        (hang_up_in_the_middle, "truncated", "connection closed in the middle of the answer"),
        (hang_up_at_once, "truncated", "connection closed before the answer began"),
        (say_nothing, "empty", "no token"),
        (speak_something_else, "malformed", ""),
        (not_stream, "malformed", "asked for a stream"),
        (never_answer, "timeout", "not done after 0.3 s"),
        (stop_in_the_middle, "timeout", "not done after 0.3 s"),
    ],
)
def test_each_way_to_fail_is_told_by_its_kind_and_does_not_hurt_the_others(
    script: Script, kind: str, words: str
) -> None:
    async def only_the_second_fails(call: Call) -> None:
        await (script if call.fields["max_tokens"] == 2 else answer_in_full)(call)

    arrivals = [ArrivalSpec(0.0, 8, 1), ArrivalSpec(0.0, 8, 2), ArrivalSpec(0.0, 8, 3)]
    deadline = 0.3 if kind == "timeout" else 60.0
    records = play(only_the_second_fails, workload_of(arrivals), timeout_seconds=deadline)
    assert kinds(records) == [None, kind, None]
    assert words in records[1].error_detail
    assert summarize(records).errors == {kind: 1}


def test_without_a_server_every_request_fails_to_connect() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"

        async def main() -> list[RequestRecord]:
            return await LoadGenerator(HttpClient(parse_url(url)), TARGET, at_once(5), timeout_seconds=60).run()

        records = asyncio.run(main())
    assert kinds(records) == ["connect"] * 5
    assert {r.error_detail for r in records} == {"connection refused"}


def test_tokens_counted_otherwise_than_the_server_counts_are_reported() -> None:
    async def script(call: Call) -> None:
        await call.stream()
        await call.text("two tokens in one event")
        await call.text("x")
        await call.usage(20, 3)
        await call.done()

    records = play(script, at_once(2))
    assert [(len(r.token_seconds), r.num_output_tokens) for r in records] == [(2, 3), (2, 3)]
    assert summarize(records).num_usage_mismatches == 2


def test_a_server_without_usage_is_counted_by_its_events() -> None:
    async def script(call: Call) -> None:
        await call.stream()
        for _ in range(3):
            await call.text("x")
        await call.done()

    records = play(script, at_once(1))
    assert (records[0].num_output_tokens, records[0].num_input_tokens) == (3, 20)
    assert summarize(records).num_usage_mismatches == 0


def test_chat_requests_carry_one_message_of_words() -> None:
    bodies: list[Any] = []

    async def script(call: Call) -> None:
        assert call.path == "/v1/chat/completions"
        bodies.append(call.fields)
        await answer_in_full(call)

    target = msgspec.structs.replace(
        TARGET, endpoint="chat", ignore_eos=False, temperature=0.7, more_fields={"top_p": 0.5, "max_tokens": 2}
    )
    records = play(script, at_once(1), target=target)
    assert kinds(records) == [None]
    assert bodies[0]["messages"][0]["role"] == "user"
    assert len(bodies[0]["messages"][0]["content"].split()) == 20
    assert "ignore_eos" not in bodies[0]
    assert (bodies[0]["temperature"], bodies[0]["top_p"], bodies[0]["max_tokens"]) == (0.7, 0.5, 2)


def test_stopping_cuts_off_what_is_in_flight_and_keeps_what_was_measured() -> None:
    num_hanging = 0
    three_hang = asyncio.Event()

    async def script(call: Call) -> None:
        nonlocal num_hanging
        if call.fields["max_tokens"] < 9:
            await answer_in_full(call)
            return
        num_hanging += 1
        if num_hanging == 3:
            three_hang.set()
        await call.stream()
        await call.text("a")
        await asyncio.sleep(3600)

    async def stop(generator: LoadGenerator) -> None:
        await three_hang.wait()
        generator.stop()

    # The turns that hang come after their session's first turn has ended, so that two are measured when three hang.
    arrivals = [
        ArrivalSpec(0.0, 8, 2, (), 0, 0),
        ArrivalSpec(0.0, 8, 9, (), 0, 1, 0.0),
        ArrivalSpec(0.0, 8, 2, (), 1, 0),
        ArrivalSpec(0.0, 8, 9, (), 1, 1, 0.0),
        ArrivalSpec(0.0, 8, 9),
        ArrivalSpec(1e6, 8, 2),
    ]
    records = play(script, workload_of(arrivals), meanwhile=stop)
    assert [r.interrupted for r in records] == [False, True, False, True, True]
    assert kinds(records) == [None] * 5
    summary = summarize(records)
    assert (summary.num_successful, summary.num_failed, summary.num_interrupted) == (2, 0, 3)


def test_a_bad_line_in_a_trace_ends_the_run_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01,5,5\n2024-01-01,x,5\n")
    with pytest.raises(DeploymentError, match="line 3: column ContextTokens"):
        play(answer_in_full, open_trace(path))


def test_an_error_of_the_generators_own_is_raised_and_not_counted_as_the_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(LoadGenerator, "_body", broken)
    with pytest.raises(ZeroDivisionError):
        play(answer_in_full, at_once(3))


def test_hundreds_of_requests_at_once_are_played() -> None:
    assert kinds(play(answer_in_full, at_once(300))) == [None] * 300
