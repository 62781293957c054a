"""A stderr that cannot be written ends no work."""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path

import pytest
from rich.console import Console

from transload.control.messages import Cancel, RequestId
from transload.runtime.event_log import EventLog
from transload.runtime.last_words import lenient_stderr

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_stderr_loses_words_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = FULL.open("w", buffering=1)
    monkeypatch.setattr(sys, "stderr", full)
    try:
        with pytest.raises(OSError, match="No space"):
            sys.stderr.write("lost\n")
        with lenient_stderr():
            sys.stderr.write("lost\n")
            sys.stderr.flush()
            Console(stderr=True).print("[green]lost[/]")
            try:
                raise ValueError("lost")
            except ValueError:
                traceback.print_exc()
            (tmp_path / "file").write_text("")
            EventLog(tmp_path / "file" / "folder", "decode-0").write(1.0, Cancel(RequestId(3), 1))
            assert sys.stderr.fileno() == full.fileno()
        assert sys.stderr is full
    finally:
        monkeypatch.undo()
        with contextlib.suppress(OSError):  # what it still holds
            full.close()
