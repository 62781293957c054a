"""One question to a server, and where its answer's time went: what `transload serve --ask` shows."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from transload.errors import TransloadError
from transload.study.chat import show_answer, show_stats
from transload.study.conversation import Conversation


def ask_once(url: str, text: str, console: Console, *, api_key: str | None = None) -> int:
    """Print the answer as it comes, then its waterfall. 0, or 1 if it failed (and then the reason is printed)."""
    conversation = Conversation(url, api_key=api_key, temperature=0.0)
    try:
        conversation.connect()
        show_answer(conversation, text, console)
        if conversation.last is not None:
            show_stats(conversation, conversation.last, console)
    except TransloadError as problem:
        console.print(Text(str(problem), style="red"))
        return 1
    finally:
        conversation.close()
    return 0
