"""Real processes killed for real: streams go on with the right text, or end in an error that says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.live import LiveServer, eventually, leaves_no_files

pytestmark = pytest.mark.slow
PROMPT = "The history of the steam engine begins"
EXACT = ("--dtype", "float32", "--deterministic", "--set", "router.local_prefill=fallback")


class Streaming(threading.Thread):
    """A caller in a thread of its own."""

    def __init__(self, server: LiveServer, prompt: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._prompt = prompt
        self._max_tokens = max_tokens
        self.pieces: list[str] = []
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.prompt_tokens = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            stream = self._server.client.completions.create(
                model="default",
                prompt=self._prompt,
                max_tokens=self._max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                if chunk.usage is not None:
                    self.completion_tokens = chunk.usage.completion_tokens
                    self.prompt_tokens = chunk.usage.prompt_tokens
                for choice in chunk.choices:
                    self.pieces.append(choice.text)
                    self.finish_reason = choice.finish_reason or self.finish_reason
        except Exception as error:
            self.error = error

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def wait_for_pieces(self, count: int) -> None:
        eventually(lambda: len(self.pieces) >= count or not self.is_alive())

    def finish(self) -> None:
        self.join(90)
        assert not self.is_alive(), "the stream hangs"
        assert self.error is None, self.error


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with leaves_no_files(), LiveServer(*EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: LiveServer) -> Streaming:
    caller = Streaming(server, PROMPT, 80)
    caller.start()
    caller.finish()
    return caller


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
@pytest.mark.parametrize("after_pieces", [0, 1, 20])
def test_a_stream_survives_the_kill_of_a_worker(
    server: LiveServer, undisturbed: Streaming, victim: str, after_pieces: int
) -> None:
    eventually(lambda: all(worker["state"] == "ready" for worker in server.workers().values()))
    caller = Streaming(server, PROMPT, 80)
    caller.start()
    caller.wait_for_pieces(after_pieces)
    killed = server.kill(victim)
    caller.finish()
    assert caller.text == undisturbed.text
    assert caller.finish_reason == "length"
    assert (caller.prompt_tokens, caller.completion_tokens) == (undisturbed.prompt_tokens, 80)
    server.wait_for_worker(victim, other_than=killed)


def test_a_stopped_worker_is_noticed_and_replaced(server: LiveServer, undisturbed: Streaming) -> None:
    eventually(lambda: all(worker["state"] == "ready" for worker in server.workers().values()))
    caller = Streaming(server, PROMPT, 80)
    caller.start()
    caller.wait_for_pieces(10)
    stopped = server.kill("decode-0", signal.SIGSTOP)
    caller.finish()
    assert caller.text == undisturbed.text
    server.wait_for_worker("decode-0", other_than=stopped)


def test_without_a_prefill_pool_decode_workers_prefill_themselves(server: LiveServer, undisturbed: Streaming) -> None:
    eventually(lambda: all(worker["state"] == "ready" for worker in server.workers().values()))
    killed = server.kill("prefill-0")
    eventually(lambda: server.workers()["prefill-0"]["state"] != "ready")
    answer = server.client.completions.create(
        model="default", prompt=PROMPT, max_tokens=80, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == undisturbed.text
    waterfall = server.get(f"/requests/{answer.id}")["choices"][0]
    assert {stage["worker"] for stage in waterfall["stages"] if stage["worker"]} == {"decode-0"}
    server.wait_for_worker("prefill-0", other_than=killed)


def test_requests_go_over_the_split_again_after_a_recovery(server: LiveServer) -> None:
    def splits() -> bool:
        answer = server.client.completions.create(model="default", prompt=PROMPT, max_tokens=4, temperature=0)
        stages = server.get(f"/requests/{answer.id}")["choices"][0]["stages"]
        return {"prefill-0", "decode-0"} <= {stage["worker"] for stage in stages}

    eventually(splits)
