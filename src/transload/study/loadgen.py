"""Plays a workload against a live server and writes down when each token came.

Open loop: an arrival starts when it is due, whatever became of those before it. This file must never judge: it yields
records, `metrics.py` makes numbers of them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from transload.study.answers import StreamedAnswer
from transload.study.http_client import ConnectFailed, ConnectionBroke, HttpClient, NotHttp
from transload.study.metrics import ErrorKind, RequestRecord
from transload.study.prompts import Prompts
from transload.study.schedule import Due, Schedule
from transload.study.target import Target
from transload.study.workload import Workload


@dataclass
class Progress:
    """Where a run stands."""

    num_started: int = 0
    num_ended: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    """Of requests that have ended."""

    @property
    def num_in_flight(self) -> int:
        return self.num_started - self.num_ended


class LoadGenerator:
    """One run of a workload. `run` once; `stop` and `progress` may be used meanwhile, from the same event loop."""

    def __init__(self, client: HttpClient, target: Target, workload: Workload, *, timeout_seconds: float) -> None:
        """`timeout_seconds`: the deadline of each request, from when it is sent to its last token."""
        self.progress = Progress()
        self._client = client
        self._target = target
        self._schedule = Schedule(workload)
        self._prompts = Prompts(target.vocabulary, seed=workload.seed, block_size=workload.block_size)
        self._timeout_seconds = timeout_seconds
        self._records: list[RequestRecord] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._began = 0.0

    async def run(self) -> list[RequestRecord]:
        """Play the workload to its end, or until `stop`. Records in the workload's order. Raises whatever the workload
        raises (a bad line of a trace), after cutting off what is in flight."""
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        try:
            while not self._is_stopping and not self._schedule.is_over:
                while (due := self._schedule.take(self._now())) is not None:
                    self._start(due)
                await self._wait(self._schedule.next_seconds())
        finally:
            self._is_stopping = True
            for task in self._tasks:
                task.cancel()
            results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return sorted(self._records, key=lambda record: record.index)

    def stop(self) -> None:
        """Start nothing more and cut off what is in flight; `run` then returns."""
        self._is_stopping = True
        self._changed.set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    async def _wait(self, until_seconds: float | None) -> None:
        """Until then, or until a request ends or the user stops."""
        self._changed.clear()
        if self._is_stopping or self._schedule.is_over:
            return
        try:
            async with asyncio.timeout_at(None if until_seconds is None else self._began + until_seconds):
                # Without a time there is something in flight, and that has a deadline.
                await self._changed.wait()
        except TimeoutError:
            pass

    def _start(self, due: Due) -> None:
        self.progress.num_started += 1
        task = asyncio.create_task(self._play(due))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)
        else:
            self.stop()  # a bug of ours: `run` raises it
        self._changed.set()

    async def _play(self, due: Due) -> None:
        body = self._body(due)
        answer = StreamedAnswer()
        start_seconds = self._now()

        def sent() -> None:
            nonlocal start_seconds
            start_seconds = self._now()

        path = "/v1/chat/completions" if self._target.endpoint == "chat" else "/v1/completions"
        interrupted = False
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._client.exchange("POST", path, body, answer, sent)
            answer.finish()
        except TimeoutError:
            answer.fail("timeout", f"not done after {self._timeout_seconds:g} s")
        except asyncio.CancelledError:
            if not self._is_stopping:
                raise
            interrupted = True
        except ConnectFailed as problem:
            answer.fail("connect", str(problem))
        except ConnectionBroke as problem:
            answer.fail("truncated", str(problem))
        except NotHttp as problem:
            answer.fail("malformed", str(problem))
        end_seconds = self._now()
        self._schedule.ended(due.arrival, end_seconds)
        self._write_down(due, answer, start_seconds, end_seconds, interrupted)

    def _write_down(
        self, due: Due, answer: StreamedAnswer, start_seconds: float, end_seconds: float, interrupted: bool
    ) -> None:
        token_seconds = [at - self._began for at in answer.token_seconds]
        num_output_tokens = answer.num_output_tokens
        error: ErrorKind | None = None if interrupted else answer.error
        record = RequestRecord(
            index=due.number,
            due_seconds=due.due_seconds,
            start_seconds=start_seconds,
            end_seconds=end_seconds,
            token_seconds=token_seconds,
            num_input_tokens=due.arrival.num_input_tokens
            if answer.num_input_tokens is None
            else answer.num_input_tokens,
            num_output_tokens=len(token_seconds) if num_output_tokens is None else num_output_tokens,
            num_output_asked=due.arrival.num_output_tokens,
            num_cached_tokens=answer.num_cached_tokens,
            answer_id=answer.id,
            error=error,
            error_detail=answer.error_detail if error is not None else "",
            interrupted=interrupted,
        )
        self._records.append(record)
        self.progress.num_ended += 1
        self.progress.num_failed += error is not None
        self.progress.num_output_tokens += record.num_output_tokens

    def _body(self, due: Due) -> bytes:
        target = self._target
        fields: dict[str, object] = {"model": target.model}
        if target.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": self._prompts.text(due.number, due.arrival)}]
        elif target.prompt_kind == "ids":
            fields["prompt"] = self._prompts.ids(due.number, due.arrival)
        else:
            fields["prompt"] = self._prompts.text(due.number, due.arrival)
        fields["max_tokens"] = due.arrival.num_output_tokens
        fields["temperature"] = target.temperature
        fields["stream"] = True
        fields["stream_options"] = {"include_usage": True}
        if target.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields | target.more_fields)
