"""The split of a running server is changed and changed back, with streams under way."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.e2e.live import LiveServer, eventually, leaves_no_files
from tests.e2e.test_afd import STREAMED, counts, golden, stream
from tests.e2e.test_exact import EXACT

pytestmark = pytest.mark.slow
SMALL = ("--set", "pools.decode.memory=256 MiB", "--set", "pools.prefill.memory=256 MiB")
FEED_FORWARD_BYTES = 30 * 3 * 576 * 1536 * 4


def split(server: LiveServer, topology: str) -> Any:
    call = urllib.request.Request(
        f"{server.url}/admin/split",
        json.dumps({"topology": topology}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=240) as answer:
        return json.loads(answer.read())


def own_bytes(server: LiveServer, worker: str) -> int:
    """What a worker's process holds beside shared memory and mapped files."""
    with open(f"/proc/{server.pid(worker)}/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def test_feed_forwards_move_out_and_back_under_load_and_no_token_changes() -> None:
    with leaves_no_files(), LiveServer(*EXACT, *SMALL) as server:
        expected = [golden(prompt) for prompt in STREAMED]
        pids = {name: server.pid(name) for name in ("prefill-0", "decode-0")}
        whole = own_bytes(server, "decode-0")
        assert stream(server, lambda: split(server, "1p1a1f")) == expected
        assert set(server.workers()) == {"prefill-0", "decode-0", "ffn-0"}
        assert whole - own_bytes(server, "decode-0") > 0.8 * FEED_FORWARD_BYTES
        assert stream(server, lambda: split(server, "1p1a2f")) == expected
        assert stream(server, lambda: None) == expected
        eventually(lambda: all(counts(server, ffn).get("requests", 0) > 0 for ffn in ("ffn-0", "ffn-1")))
        assert stream(server, lambda: split(server, "1p1d")) == expected
        assert {name: server.pid(name) for name in server.workers()} == pids
        assert stream(server, lambda: None) == expected
        assert "feed_forwards" not in server.workers()["decode-0"] or counts(server, "decode-0")["computed_here"] == 0
        with pytest.raises(urllib.error.HTTPError) as refused:
            split(server, "2p1d")
        assert "only feed-forwards move" in refused.value.read().decode()
