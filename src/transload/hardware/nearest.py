"""The known word closest to a misspelt one, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` if a known word is close, else nothing."""
    spelt = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelt, n=1, cutoff=0.55)
    return f'; did you mean "{spelt[close[0]]}"?' if close else ""
