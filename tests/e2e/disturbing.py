"""Callers that keep a real server busy, somebody who kills and stops its workers, and what became of every stream.

A stream may be whole, or end in a typed error after a beginning of the right text. Everything else is wrong. Used by
the tests here and, for longer, by `benchmarks/real_faults.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import openai
import psutil

from tests.e2e.live import LiveServer

PROMPTS = (
    "The history of the steam engine begins",
    "In the beginning there was a small house by the sea, and in it lived",
    "Water boils when",
    "A list of the planets of the solar system, from the sun outwards:",
    "Once upon a time a fox and a crow met at the edge of the forest. The fox said",
    "The capital cities of Europe are known for",
)
STREAM_SECONDS = 120.0
"""A stream that takes longer hangs: far above what one takes with every worker started anew on the way."""
STOPS_SECONDS = (0.2, 1.0, 3.0)


class Answer:
    """What one stream brought."""

    def __init__(self) -> None:
        self.id = ""
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: tuple[int, int] | None = None
        """Prompt and completion tokens, from the only chunk that has them."""
        self.num_usages = 0
        self.error: str | None = None
        """The code of a typed error."""
        self.untyped: str | None = None


def ask(client: openai.OpenAI, prompt: str, max_tokens: int) -> Answer:
    """One stream to its end, whatever that is."""
    answer = Answer()
    try:
        stream = client.completions.create(
            model="default",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            answer.id = chunk.id
            if chunk.usage is not None:
                answer.num_usages += 1
                answer.usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            for choice in chunk.choices:
                answer.text += choice.text
                answer.finish_reason = choice.finish_reason or answer.finish_reason
    except openai.APIError as error:
        if isinstance(error.body, dict) and error.code:
            answer.error = str(error.code)
        else:
            answer.untyped = f"{type(error).__name__}: {error}"
    except Exception as error:
        answer.untyped = f"{type(error).__name__}: {error}"
    return answer


def judge(answer: Answer, right: Answer) -> str:
    """How a stream ended, or what is wrong with it, beginning with "WRONG"."""
    if answer.untyped is not None:
        return f"WRONG: ended without a typed error: {answer.untyped}"
    if answer.error is not None:
        return f"typed error: {answer.error}" if right.text.startswith(answer.text) else "WRONG: other text, then error"
    if answer.finish_reason is None:
        return "WRONG: ended in silence"
    if answer.text != right.text:
        return f"WRONG: other text: {answer.text!r}"
    if answer.usage != right.usage or answer.num_usages != 1:
        return f"WRONG: usage {answer.usage} in {answer.num_usages} chunks, not {right.usage}"
    return "whole"


class Load:
    """Callers, each with one stream after another, until told to stop or the server is gone."""

    def __init__(self, server: LiveServer, right: dict[str, Answer], *, num_callers: int, max_tokens: int) -> None:
        self._server = server
        self._client = server.client.with_options(timeout=STREAM_SECONDS)
        self._right = right
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._is_over = False
        self.ends: Counter[str] = Counter()
        self.num_hung = 0
        """Streams that had not ended after `STREAM_SECONDS`, however they ended then."""
        self.num_recovered = 0
        """Streams that were started anew on the way, at least once, and came whole, their tokens counted once."""
        self.slowest_seconds = 0.0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(num_callers)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        prompts = [*self._right]
        turn = number
        while not self._stop.is_set() and self._server.process.poll() is None:
            prompt = prompts[turn % len(prompts)]
            turn += 1
            began = time.monotonic()
            answer = ask(self._client, prompt, self._max_tokens)
            seconds = time.monotonic() - began
            end = judge(answer, self._right[prompt])
            is_recovered = end == "whole" and self._was_started_anew(answer)
            with self._lock:
                if self._is_over:
                    return  # it was counted as hung
                self.ends[end] += 1
                self.num_hung += seconds > STREAM_SECONDS
                self.num_recovered += is_recovered
                self.slowest_seconds = max(self.slowest_seconds, seconds)

    def _was_started_anew(self, answer: Answer) -> bool:
        with contextlib.suppress(OSError, ValueError):  # then it is not counted
            (choice,) = self._server.get(f"/requests/{answer.id}")["choices"]
            return any(stage["name"] == "recovery queue" for stage in choice["stages"])
        return False

    def stop(self) -> None:
        """Wait for the streams under way, for as long as they may take; those that go on then are counted as hung."""
        self._stop.set()
        deadline = time.monotonic() + STREAM_SECONDS + 10
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._is_over = True
            self.num_hung += sum(thread.is_alive() for thread in self._threads)

    @property
    def wrong(self) -> list[str]:
        return [end for end in self.ends if end.startswith("WRONG")]


def undisturbed(server: LiveServer, prompts: Sequence[str], max_tokens: int) -> dict[str, Answer]:
    """Each prompt's answer when nothing happens."""
    right = {prompt: ask(server.client, prompt, max_tokens) for prompt in prompts}
    for answer in right.values():
        assert judge(answer, answer) == "whole", vars(answer)
        assert answer.finish_reason == "length"
    return right


def disturb(server: LiveServer, random: Random, done: Counter[str], *, kinds: Sequence[str] = ("kill", "stop")) -> None:
    """Something happens to some worker that is up; what is counted. A stop ends after a while, with SIGCONT."""
    up = {name: worker for name, worker in server.workers().items() if worker["pid"] is not None}
    if not up:
        return
    name = random.choice(sorted(up))
    kind, pid = random.choice(kinds), up[name]["pid"]
    with contextlib.suppress(ProcessLookupError):
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            seconds = random.choice(STOPS_SECONDS)
            os.kill(pid, signal.SIGSTOP)
            timer = threading.Timer(seconds, _go_on, args=(pid,))
            timer.daemon = True
            timer.start()
        done[f"{kind} {name}, {up[name]['state']}"] += 1


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def holdings(server: LiveServer) -> dict[str, Any]:
    """What the server holds when it is idle: to be the same before and after. Open files of the front end, processes,
    blocks in all, workers that are ready."""
    workers = server.workers()
    process = psutil.Process(server.process.pid)
    return {
        "ready": sorted(name for name, worker in workers.items() if worker["state"] == "ready"),
        "processes": len(process.children(recursive=True)),
        "files": process.num_fds(),
        "blocks": {state: server.metric("transload_blocks", state=state) for state in ("referenced", "quarantined")},
        "capacity": sum(worker["blocks"] or 0 for worker in workers.values()),
    }


def all_ready(server: LiveServer) -> bool:
    return all(worker["state"] == "ready" for worker in server.workers().values())
