"""Worker processes out of the fork server: how they end, and that they outlive it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import psutil
import pytest

from transload.runtime.forks import ForkedProcesses, worker_processes
from transload.runtime.processes import Process

pytestmark = pytest.mark.slow
WAIT_SECONDS = 60.0


def play(story: Callable[[ForkedProcesses, str], Awaitable[None]]) -> None:
    """Tell a story with a front end that listens and says nothing."""

    async def told() -> None:
        held: list[asyncio.StreamWriter] = []
        front_end = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
        host, port = front_end.sockets[0].getsockname()
        before = psutil.Process().children()  # the tests' own
        processes = worker_processes()
        assert isinstance(processes, ForkedProcesses)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await story(processes, f"{host}:{port}")
        finally:
            processes.close()
            front_end.close()
            for writer in held:
                writer.close()
        assert psutil.Process().children() == before

    asyncio.run(told())


def fork_server_of(process: Process) -> psutil.Process:
    parent = psutil.Process(process.pid).parent()
    assert parent is not None
    return parent


def test_how_a_worker_ended_is_known() -> None:
    async def story(processes: ForkedProcesses, join: str) -> None:
        first, second = [await processes.start(join, name, "token") for name in ("decode-0", "decode-1")]
        assert psutil.Process(first.pid).name() == "decode-0"
        assert fork_server_of(first) == fork_server_of(second)
        second.kill()
        assert await second.ended() == "was killed by signal 9"
        second.kill()
        assert psutil.pid_exists(first.pid)
        first.kill()
        await first.ended()
        nobody_there = await processes.start("127.0.0.1:1", "decode-2", "token")
        assert await nobody_there.ended() == "exited with code 1"

    play(story)


def test_workers_outlive_the_fork_server_and_there_will_be_another() -> None:
    async def story(processes: ForkedProcesses, join: str) -> None:
        first = await processes.start(join, "decode-0", "token")
        before = fork_server_of(first)
        before.suspend()
        starting = asyncio.create_task(processes.start(join, "decode-1", "token"))
        await asyncio.sleep(0)
        before.kill()
        with pytest.raises(OSError, match="the fork server was killed by signal 9"):
            await starting
        second = await processes.start(join, "decode-2", "token")
        assert fork_server_of(second) != before
        assert psutil.pid_exists(first.pid)
        first.kill()
        assert await first.ended() == "has ended"
        second.kill()
        await second.ended()

    play(story)
