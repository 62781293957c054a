"""`transload chat`: talk to a running server from the terminal. Owns keys and screen, not the connection."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from transload.errors import TransloadError
from transload.study.conversation import Conversation, Turn
from transload.study.waterfall import draw_waterfall

HELP = """\
/reset          forget what was said
/system TEXT    set the system prompt (none: show it; a single -: remove it)
/stats          times of the last answer, and where they went
/quit           leave (or Ctrl-D); Ctrl-C cuts an answer short"""
EXIT_INTERRUPTED = 130
# What a model writes must not steer the terminal: everything that is a control character but newline and tab.
_CONTROLS = {code: "�" for code in (*range(32), 127, *range(0x80, 0xA0)) if code not in (9, 10)}


def run(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    ask: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
) -> int:
    """Chat until the user leaves. With `ask`: one question. With stdin from a pipe: each line is a turn.

    0, or 1 if a question failed, or 130 if a question without a terminal was interrupted. Raises `TransloadError` if
    there is no server.
    """
    console = Console(highlight=False, soft_wrap=True)
    conversation = Conversation(
        url, model=model, api_key=api_key, system=system, max_tokens=max_tokens, temperature=temperature
    )
    try:
        name = conversation.connect()
        if ask is not None:
            return _answer(conversation, ask, console)
        if sys.stdin.isatty():
            console.print(Text(f"{name} at {conversation.url}; /help for commands", style="dim"))
            return _talk(conversation, console)
        return _read_turns(conversation, console)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        conversation.close()


def _talk(conversation: Conversation, console: Console) -> int:
    """Lines typed by a person. A failed answer does not end the chat."""
    try:
        import readline  # noqa: F401  (gives `input` a history and line editing, where there is one)
    except ImportError:
        pass
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print()
            continue
        if line in ("/quit", "/exit"):
            return 0
        if line.startswith("/"):
            _command(conversation, line, console)
        elif line:
            _answer(conversation, line, console)


def _read_turns(conversation: Conversation, console: Console) -> int:
    """Lines from a pipe. The first failed answer ends it, for the turns after it would build on nothing."""
    for line in sys.stdin:
        line = line.strip()
        if line in ("/quit", "/exit"):
            break
        if line.startswith("/"):
            _command(conversation, line, console)
        elif line and (code := _answer(conversation, line, console)):
            return code
    return 0


def _answer(conversation: Conversation, text: str, console: Console) -> int:
    try:
        show_answer(conversation, text, console)
    except TransloadError as problem:
        console.file.flush()
        Console(stderr=True, highlight=False).print(Text(str(problem).translate(_CONTROLS), style="red"))
        return 1
    except KeyboardInterrupt:
        console.print()
        console.print(Text("(cut short)", style="dim"))
        return EXIT_INTERRUPTED
    return 0


def show_answer(conversation: Conversation, text: str, console: Console) -> None:
    """Ask, and print the answer as it comes. Raises `TransloadError`; leaves the line ended whatever happens."""
    answer = conversation.say(text)
    try:
        for part in answer:
            console.file.write(part.translate(_CONTROLS))
            console.file.flush()
    finally:
        answer.close()  # type: ignore[attr-defined]
        console.file.write("\n")
        console.file.flush()


def _command(conversation: Conversation, line: str, console: Console) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/reset":
            conversation.reset()
            console.print(Text("forgotten", style="dim"))
        case "/system":
            if rest:
                conversation.system = None if rest == "-" else rest
            console.print(Text(f"system prompt: {conversation.system or '(none)'}", style="dim"))
        case "/stats":
            if conversation.last is None:
                console.print(Text("no answer yet", style="dim"))
            else:
                show_stats(conversation, conversation.last, console)
        case _:
            if name not in ("/help", "/?"):
                console.print(Text(f"no such command: {name}", style="red"))
            console.print(Text(HELP, style="dim"))


def show_stats(conversation: Conversation, turn: Turn, console: Console) -> None:
    """What the last answer took, as seen from here and, if it tells, by the server."""
    parts = [f"{turn.num_tokens} tokens"]
    if turn.answer.num_input_tokens is not None:
        parts.insert(0, f"{turn.answer.num_input_tokens} prompt tokens")
    if turn.ttft_seconds is not None:
        parts.append(f"first after {turn.ttft_seconds * 1000:.0f} ms")
    if turn.tokens_per_second is not None:
        parts.append(f"then {turn.tokens_per_second:.1f} tokens/s")
    console.print(Text(", ".join(parts), style="dim"))
    for waterfall in conversation.waterfalls():
        draw_waterfall(waterfall, console)
