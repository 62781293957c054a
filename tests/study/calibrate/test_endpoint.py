"""An endpoint is measured from outside: a scripted server whose delays are known."""

from __future__ import annotations

import asyncio

from tests.study.scripted_server import Call, server_in_thread
from transload.study.calibrate.effort import Effort
from transload.study.calibrate.endpoint import calibrate_endpoint

PREFILL, STEP = 0.03, 0.01


async def answer(call: Call) -> None:
    if call.path == "/v1/models":
        await call.json(200, {"data": [{"id": "scripted"}]})
        return
    if not call.path.endswith("/completions"):
        await call.json(404, {})
        return
    await call.stream()
    count = call.fields["max_tokens"]
    for number in range(count):
        await asyncio.sleep(PREFILL if number == 0 else STEP)
        await call.text(f" w{number}")
    await call.usage(len(call.fields["prompt"]), count)
    await call.done()


def test_what_users_feel_becomes_steps() -> None:
    said: list[str] = []
    with server_in_thread(answer) as url:
        measured = calibrate_endpoint(url, Effort(quick=True), said.append, command="a test", api_key=None)
    assert measured.model == "scripted"
    # A busy machine adds to delays, never takes away.
    assert all(point.seconds > PREFILL * 0.9 for point in measured.prefill)
    assert [point.requests for point in measured.decode] == [1, 2]
    for point in measured.decode:
        assert point.fixed_seconds + point.context_token_seconds * point.requests * 72 > STEP * 0.9
    assert sum("to the first token" in line for line in said) == 2
