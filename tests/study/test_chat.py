from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from tests.study.scripted_server import Call, Script, server_in_thread
from tests.study.test_waterfall import WATERFALL
from transload.errors import TransloadError
from transload.study import chat
from transload.study.ask import ask_once
from transload.study.conversation import Conversation

REPOSITORY = Path(__file__).parents[2]
_MAIN = """
import argparse, sys
from transload.cli import chat
from transload.errors import TransloadError
parser = argparse.ArgumentParser()
chat.add_parser(parser.add_subparsers())
args = parser.parse_args()
try:
    sys.exit(args.run(args))
except TransloadError as problem:
    sys.exit(f"error: {problem}")
"""


class Scripted:
    """A chat server that keeps what it was asked."""

    def __init__(self, answer: Script | None = None) -> None:
        self.asked: list[Any] = []
        self.paths: list[str] = []
        self._answer = answer or self.echo

    async def __call__(self, call: Call) -> None:
        self.paths.append(call.path)
        if call.path == "/v1/models":
            await call.json(200, {"data": [{"id": "scripted"}]})
        elif call.path.startswith("/requests/"):
            await call.json(200, {"id": "x", "choices": msgspec.to_builtins([WATERFALL])})
        else:
            self.asked.append(call.fields)
            await self._answer(call)

    async def echo(self, call: Call) -> None:
        await call.stream()
        await call.event({"id": "chatcmpl-1", "choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in ("you ", "said ", call.fields["messages"][-1]["content"]):
            await call.text(word)
        await call.usage(5, 4)
        await call.done()


def piped(url: str, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _MAIN, "chat", url, *words],
        input=text,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_each_line_from_a_pipe_is_a_turn_and_the_history_grows() -> None:
    server = Scripted()
    with server_in_thread(server) as url:
        done = piped(url, "hello\n\nagain\n", "--system", "be brief", "--max-tokens", "9", "--temperature", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "you said hello\nyou said again\n"
    assert server.asked[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]
    assert server.asked[1]["messages"][1:] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "you said hello"},
        {"role": "user", "content": "again"},
    ]
    assert server.asked[0]["model"] == "scripted"
    assert (server.asked[0]["max_tokens"], server.asked[0]["temperature"]) == (9, 0)


def test_bytes_that_are_no_text_do_not_end_a_conversation() -> None:
    server = Scripted()
    with server_in_thread(server) as url, closing(Conversation(url)) as conversation:
        assert "".join(conversation.say(b"caf\xe9 \xc3\xa9".decode(errors="surrogateescape")))
    assert server.asked[0]["messages"][-1]["content"] == "caf\ufffd é"


@pytest.mark.slow
def test_commands_reset_the_history_set_the_system_prompt_and_leave() -> None:
    server = Scripted()
    with server_in_thread(server) as url:
        done = piped(url, "one\n/reset\n/system talk like a sailor\ntwo\n/system -\n/nonsense\nthree\n/quit\nnever\n")
    assert done.returncode == 0
    assert [len(asked["messages"]) for asked in server.asked] == [1, 2, 3]
    assert server.asked[1]["messages"][0] == {"role": "system", "content": "talk like a sailor"}
    assert server.asked[2]["messages"][0] == {"role": "user", "content": "two"}
    assert "no such command: /nonsense" in done.stdout
    assert "never" not in done.stdout


@pytest.mark.slow
def test_stats_show_times_and_the_waterfall_of_the_last_answer() -> None:
    server = Scripted()
    with server_in_thread(server) as url:
        done = piped(url, "/stats\nhello\n/stats\n")
    assert "no answer yet" in done.stdout
    assert re.search(r"5 prompt tokens, 4 tokens, first after \d+ ms, then [\d.]+ tokens/s", done.stdout)
    assert "/requests/chatcmpl-1" in server.paths
    assert "prefill-0" in done.stdout


def test_one_question_with_ask(capsys: pytest.CaptureFixture[str]) -> None:
    with server_in_thread(Scripted()) as url:
        assert chat.run(url, ask="hi") == 0
    assert capsys.readouterr().out == "you said hi\n"


def test_no_server_is_said_with_what_to_do() -> None:
    with pytest.raises(TransloadError, match=r"no server at http://127\.0\.0\.1:1: .*start one with `transload serve`"):
        chat.run("http://127.0.0.1:1", ask="hi")


def test_a_server_that_wants_a_key_says_so_and_gets_it(capsys: pytest.CaptureFixture[str]) -> None:
    inner = Scripted()

    async def locked(call: Call) -> None:
        if call.headers.get("authorization") == "Bearer k":
            await inner(call)
        else:
            await call.json(401, {"error": {"message": "no key"}})

    with server_in_thread(locked) as url:
        with pytest.raises(TransloadError, match="give the key with --api-key"):
            chat.run(url, ask="hi")
        assert chat.run(url, ask="hi", api_key="k") == 0


async def _refuse(call: Call) -> None:
    await call.json(400, {"error": {"message": "messages: too long"}})


async def _break_off(call: Call) -> None:
    await call.stream()
    await call.text("half")
    call.hang_up()


async def _fail_in_stream(call: Call) -> None:
    await call.stream()
    await call.text("half")
    await call.event({"error": {"message": "worker lost"}})
    await call.done()


async def _end_early(call: Call) -> None:
    await call.stream()
    await call.text("half")
    await call.end()


@pytest.mark.parametrize(
    ("script", "words", "shown"),
    [
        (_refuse, "messages: too long", ""),
        (_break_off, "went away in the middle of the answer", "half"),
        (_fail_in_stream, "worker lost", "half"),
        (_end_early, r"without \[DONE\]", "half"),
    ],
)
def test_a_question_that_fails_says_why_on_stderr_and_exits_with_1(
    script: Script, words: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with server_in_thread(Scripted(script)) as url:
        assert chat.run(url, ask="hi") == 1
    out, err = capsys.readouterr()
    assert out == shown + "\n"
    assert re.search(words, err.replace("\n", " "))


def test_a_failed_question_does_not_join_the_history(capsys: pytest.CaptureFixture[str]) -> None:
    from transload.study.conversation import Conversation

    with server_in_thread(Scripted(_fail_in_stream)) as url:
        conversation = Conversation(url)
        with pytest.raises(TransloadError, match="worker lost"):
            list(conversation.say("hi"))
        assert conversation.messages == []
        conversation.close()


def test_what_a_model_writes_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    async def paint(call: Call) -> None:
        await call.stream()
        await call.text("a\x1b[31mred\x07\x9b2J\ttab\n[bold]b")
        await call.done()

    with server_in_thread(Scripted(paint)) as url:
        assert chat.run(url, ask="hi") == 0
    assert capsys.readouterr().out == "a�[31mred��2J\ttab\n[bold]b\n"


def test_ask_once_prints_the_answer_and_draws_where_the_time_went() -> None:
    screen = io.StringIO()
    with server_in_thread(Scripted()) as url:
        assert ask_once(url, "hi", Console(file=screen, width=140)) == 0
    lines = screen.getvalue().splitlines()
    assert lines[0] == "you said hi"
    assert any(line.startswith("prefill") and "█" in line for line in lines)
    screen = io.StringIO()
    assert ask_once("http://127.0.0.1:1", "hi", Console(file=screen, width=200)) == 1
    assert "no server at" in screen.getvalue()


def test_a_server_without_waterfalls_is_no_error() -> None:
    async def plain(call: Call) -> None:
        await (call.json(404, {}) if call.path.startswith("/requests/") else Scripted()(call))

    screen = io.StringIO()
    with server_in_thread(plain) as url:
        assert ask_once(url, "hi", Console(file=screen, width=140)) == 0
    assert "first after" in screen.getvalue()


class Terminal:
    """The chat in a terminal of its own, and what it shows."""

    def __init__(self, url: str) -> None:
        self._hand, terminal = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, "chat", url],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=REPOSITORY,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "COLUMNS": "120"},
        )
        os.close(terminal)

    def type(self, text: str) -> None:
        os.write(self._hand, text.encode())

    def wait_for(self, words: str) -> None:
        """Until it shows them after what was waited for before; a minute at most."""
        self._read(lambda: words in self.shown)
        self.shown = self.shown[self.shown.index(words) + len(words) :]

    def interrupt_until(self, words: str) -> None:
        """`input` misses a Ctrl-C that comes between its prompt and its wait for keys; a person presses again."""
        shown = threading.Event()

        def press() -> None:
            while not shown.wait(0.2):
                self.process.send_signal(signal.SIGINT)

        pressing = threading.Thread(target=press)
        pressing.start()
        try:
            self.wait_for(words)
        finally:
            shown.set()
            pressing.join()

    def end(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._hand)

    def _read(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_there():
            ready, _, _ = select.select([self._hand], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"it showed only {self.shown!r}"
            try:
                self.shown += os.read(self._hand, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended with {self.shown!r}") from None


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_cuts_an_answer_short_and_ctrl_d_leaves() -> None:
    cut_off = threading.Event()

    async def endless(call: Call) -> None:
        if call.fields["messages"][-1]["content"] != "talk":
            await Scripted().echo(call)
            return
        try:
            await call.stream()
            while True:
                await call.text("bla ")
        except ConnectionError:
            cut_off.set()
            raise

    server = Scripted(endless)
    with server_in_thread(server) as url:
        terminal = Terminal(url)
        try:
            terminal.wait_for("/help for commands")
            terminal.wait_for("> ")
            terminal.type("talk\n")
            terminal.wait_for("bla bla")
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_for("(cut short)")
            terminal.wait_for("> ")
            assert cut_off.wait(60), "the server was not told that nobody listens any more"
            terminal.type("hi\n")
            terminal.wait_for("you said hi")
            terminal.wait_for("> ")
            terminal.interrupt_until("\n> ")
            terminal.type("\x04")
        finally:
            code = terminal.end()
    assert code == 0
    said = server.asked[1]["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert said[1]["content"].startswith("bla bla")
