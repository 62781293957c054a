"""The log of events: what is written can be read, and what cannot be written ends the log and not the work."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from transload.control.messages import Cancel, RequestId
from transload.runtime.event_log import EventLog, read_event_log

EVENT = Cancel(RequestId(3), 1)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "made", "decode-0", 2)
    log.write(1.25, EVENT)
    log.write(2.5, EVENT)
    log.close()
    log.write(3.0, EVENT)  # after its end: nothing
    events = read_event_log(tmp_path / "made" / "decode-0.2.jsonl")
    assert [event["at"] for event in events] == [1.25, 2.5]
    assert events[0]["event"] == "Cancel"


def test_a_full_disk_is_said_once_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(tmp_path, "decode-0")
    log.write(1.0, EVENT)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:10]))  # as a disk with ten bytes left
    log.write(2.0, EVENT)
    monkeypatch.undo()
    log.write(3.0, EVENT)
    assert capsys.readouterr().err.count("cannot be written any more") == 1
    assert [event["at"] for event in read_event_log(tmp_path / "decode-0.1.jsonl")] == [1.0]


def test_an_error_of_the_disk_is_not_one_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path, "decode-0")

    def full(_file: int, _line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    log.write(1.0, EVENT)
    log.close()
    (tmp_path / "file").write_text("")
    EventLog(tmp_path / "file" / "folder", "decode-0").write(1.0, EVENT)
