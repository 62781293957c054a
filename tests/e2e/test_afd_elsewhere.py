"""FFN workers that are started by hand, on another host or on this one: 2a1f and 1a2f over TCP, and kills there."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live import LiveServer, eventually
from tests.e2e.test_afd_experts import LENGTHS, PROMPTS, SHORT, complete, greedy
from tests.e2e.test_two_hosts import HERE, TOKEN, other_host, worker_by_hand
from tests.model.tiny_models import saved, tiny_model
from tests.model.tiny_tokenizers import byte_level, saved_tokenizer

__all__ = ["other_host"]  # a fixture
pytestmark = pytest.mark.slow
EXACT = ("--dtype", "float32", "--deterministic")


@pytest.fixture(scope="module")
def oracle() -> Any:
    return tiny_model("llama-biases").float().eval()


@contextlib.contextmanager
def waiting_server(oracle: Any, folder: Path, file: str, *changes: str) -> Iterator[LiveServer]:
    """A server of a tiny model that waits for workers to join."""
    saved(oracle, folder)
    saved_tokenizer(byte_level(), folder)
    flags = [flag for change in changes for flag in ("--set", change)]
    deployment = str(Path(__file__).parent / file)
    server = LiveServer(deployment, "--model", str(folder), *EXACT, *flags, wait=False)
    try:
        yield server
        server.check_idle()
        server.stop(signal.SIGTERM)
    finally:
        server.stop()


def complete_together(server: LiveServer, lengths: list[int]) -> list[list[str]]:
    """As `complete`, but all at once and equally long: two in a step are two micro-batches, for two workers."""
    (length,) = set(lengths)
    answer = server.client.completions.create(
        model="default",
        prompt=PROMPTS,
        max_tokens=length,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    return [list(choice.logprobs.tokens or []) for choice in choices if choice.logprobs is not None]


def address(server: LiveServer) -> str:
    return server.wait_for_output(r"--join (\S+) --name ffn-0").group(1)


@pytest.mark.netns
def test_two_attention_workers_call_one_on_another_host_and_go_on_when_it_is_killed(
    other_host: str, oracle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSLOAD_JOIN_TOKEN", TOKEN)
    changes = (f"server.join_host={HERE}", "router.policy=round_robin")
    with waiting_server(oracle, tmp_path, "two_attention_ffn_elsewhere.yaml", *changes) as server:
        join = address(server)
        with worker_by_hand(join, "ffn-0", other_host) as worker:
            server.wait_until_ready()
            assert complete(server, SHORT) == greedy(oracle, SHORT)
            for attention in ("attention-0", "attention-1"):
                assert server.workers()[attention]["ffn_links"] == {"ffn-0": "tcp"}
                eventually(lambda name=attention: server.metric("transload_ffn_calls_total", worker=name) > 0)  # type: ignore[misc]
            eventually(lambda: server.metric("transload_ffn_computed_rows_total", worker="ffn-0") > 0)
            assert server.metric("transload_ffn_hop_seconds_count") > 0
            assert server.metric("transload_ffn_fallbacks_total") == 0
            assert complete(server, LENGTHS, worker.kill) == greedy(oracle, LENGTHS)
        eventually(lambda: server.metric("transload_ffn_fallbacks_total") > 0)
        rows = server.metric("transload_ffn_computed_rows_total", worker="ffn-0")
        with worker_by_hand(join, "ffn-0", other_host):
            eventually(lambda: server.workers()["attention-0"].get("ffn_links") == {"ffn-0": "tcp"})
            assert complete(server, LENGTHS, lambda: server.kill("attention-0")) == greedy(oracle, LENGTHS)
            eventually(lambda: server.metric("transload_ffn_computed_rows_total", worker="ffn-0") > rows)


def test_one_of_two_workers_that_were_started_by_hand_is_enough_and_another_may_join_again(
    oracle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSLOAD_JOIN_TOKEN", TOKEN)
    with (
        waiting_server(oracle, tmp_path, "one_attention_two_ffn_elsewhere.yaml") as server,
        contextlib.ExitStack() as workers,
    ):
        join = address(server)

        def start(name: str) -> subprocess.Popen[bytes]:
            return workers.enter_context(worker_by_hand(join, name))

        first, _ = start("ffn-0"), start("ffn-1")
        server.wait_until_ready()
        assert complete(server, LENGTHS, first.kill) == greedy(oracle, LENGTHS)
        eventually(lambda: server.workers()["attention-0"].get("ffn_links") == {"ffn-1": "tcp"})
        rows = server.metric("transload_ffn_computed_rows_total", worker="ffn-0")
        start("ffn-0")
        eventually(lambda: len(server.workers()["attention-0"].get("ffn_links", {})) == 2)
        assert complete_together(server, SHORT) == greedy(oracle, SHORT)
        eventually(lambda: server.metric("transload_ffn_computed_rows_total", worker="ffn-0") > rows)
        assert server.metric("transload_ffn_fallbacks_total") == 0
