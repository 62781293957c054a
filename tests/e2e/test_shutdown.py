"""However a server ends, it leaves no process, no shared memory and no file behind."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.live import LiveServer, eventually, leaves_no_files

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(number: signal.Signals) -> None:
    with leaves_no_files(), LiveServer() as server:
        server.workers()
        assert server.stop(number) == 0
        assert "every worker is gone" in server.output()


def test_a_signal_lets_running_requests_finish() -> None:
    with LiveServer() as server:
        texts: list[str] = []

        def ask() -> None:
            answer = server.client.completions.create(
                model="default", prompt="Once", max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
            )
            texts.append(answer.choices[0].finish_reason)

        caller = threading.Thread(target=ask)
        caller.start()
        eventually(lambda: server.get("/health")["requests"] == 1)
        server.stop(signal.SIGTERM)
        caller.join(30)
        assert texts == ["length"]


def test_a_signal_while_starting_leaves_nothing() -> None:
    with leaves_no_files():
        server = LiveServer(wait=False)
        eventually(lambda: psutil.Process(server.process.pid).children())
        assert server.stop(signal.SIGINT) == 130


def test_a_second_signal_ends_running_streams_in_an_error_that_says_why() -> None:
    with leaves_no_files(), LiveServer() as server:
        stream = server.client.completions.create(
            model="default", prompt="Once", max_tokens=5000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.workers()
        server.process.send_signal(signal.SIGINT)
        server.wait_for_output("again to end at once")
        assert server.stop(signal.SIGINT) == 0
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            for _event in stream:
                pass
        assert "Traceback" not in server.output()


def test_a_taken_port_is_refused_before_any_worker_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = LiveServer("--port", str(port), wait=False)
        assert server.process.wait(60) == 2
    assert f"port {port} of 127.0.0.1 is taken" in server.output()
    assert "every worker is gone" not in server.output()
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_download_of_the_model(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_index:
        monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple")
        server = LiveServer(wait=False)
        silent_index.settimeout(60)
        asking, _address = silent_index.accept()
        with asking:
            pip = psutil.Process(server.process.pid).children()
            assert server.stop(number) == 130
        assert pip
        assert not any(process.is_running() for process in pip)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_workers_leave_when_their_front_end_is_killed() -> None:
    with leaves_no_files():
        server = LiveServer()
        server.wait_until_ready()
        workers = [psutil.Process(server.pid(name)) for name in server.workers()]
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        gone, alive = psutil.wait_procs(workers, 10)
        assert len(gone) == 2
        assert not alive


def test_a_worker_process_has_the_worker_s_name() -> None:
    with LiveServer() as server:
        assert psutil.Process(server.pid("decode-0")).name() == "decode-0"


def test_a_model_that_is_not_there_is_a_clear_error_and_no_process_stays() -> None:
    server = LiveServer("--model", "/nowhere/model.gguf", wait=False)
    assert server.process.wait(60) == 2
    assert "/nowhere/model.gguf" in server.output()
    server.stop()
