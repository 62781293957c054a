"""Mixtures with their experts in other processes: the tokens of transformers, whoever owns an expert or is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.live import LiveServer, eventually
from tests.e2e.test_afd import counts
from tests.model.tiny_models import saved, tiny_model
from tests.model.tiny_tokenizers import byte_level, saved_tokenizer

pytestmark = pytest.mark.slow
PROMPTS = [[5, 17, 30, 8, 99, 41, 3, 77, 12, 60, 28, 90, 55, 14, 71, 33, 47, 9, 64], [200, 7], [31] * 40]
LENGTHS = [150, 12, 12]
SHORT = [12, 12, 12]


def greedy(oracle: Any, lengths: list[int]) -> list[list[str]]:
    with torch.inference_mode():
        outputs = [
            oracle.generate(
                torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
            for prompt, length in zip(PROMPTS, lengths, strict=True)
        ]
    return [[f"token_id:{token}" for token in tokens] for tokens in outputs]


def serving(oracle: Any, folder: Path, topology: str, *changes: str) -> LiveServer:
    saved(oracle, folder)
    saved_tokenizer(byte_level(), folder)
    flags = [flag for change in changes for flag in ("--set", change)]
    exact = ("--dtype", "float32", "--deterministic")
    return LiveServer("--model", str(folder), "--topology", topology, *exact, *flags)


def complete(server: LiveServer, lengths: list[int], meanwhile: Callable[[], object] | None = None) -> list[list[str]]:
    """Greedy continuations of all prompts; `meanwhile` is called after the first tokens of the first have come."""
    found: list[list[str]] = []
    for number, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        tokens: list[str] = []
        stream = server.client.completions.create(
            model="default",
            prompt=prompt,
            max_tokens=length,
            temperature=0,
            logprobs=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        for chunk in stream:
            for choice in chunk.choices:
                if choice.logprobs is not None:
                    tokens += choice.logprobs.tokens or []
            if number == 0 and len(tokens) >= 4 and meanwhile is not None:
                meanwhile()
                meanwhile = None
        found.append(tokens)
    return found


@pytest.fixture(scope="module")
def oracle() -> Any:
    return tiny_model("qwen3_moe").float().eval()


@pytest.fixture(scope="module")
def server(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Two workers with half of the experts each, and a copy of one at the other."""
    changes = ("pools.aggregated.ffn.split=expert", "pools.aggregated.ffn.replicas=1")
    with serving(oracle, tmp_path_factory.mktemp("qwen3_moe"), "1a2f", *changes) as made:
        yield made


def test_every_expert_is_computed_by_its_owner(server: LiveServer, oracle: Any) -> None:
    assert complete(server, SHORT) == greedy(oracle, SHORT)
    eventually(lambda: counts(server, "aggregated-0").get("calls", 0) > 0)
    told = counts(server, "aggregated-0")
    assert told["computed_here"] == told["holds_weights"] == told["unknown"] == 0
    eventually(lambda: all(counts(server, ffn).get("requests", 0) > 0 for ffn in ("ffn-0", "ffn-1")))


def test_an_owner_killed_in_the_middle_changes_no_token(server: LiveServer, oracle: Any) -> None:
    """Its copied expert is computed by the other worker, the others here, until it is back."""
    pids: list[int] = []
    assert complete(server, LENGTHS, lambda: pids.append(server.kill("ffn-0"))) == greedy(oracle, LENGTHS)
    eventually(lambda: counts(server, "aggregated-0")["computed_here"] > 0)
    server.wait_for_worker("ffn-0", other_than=pids[0])
    eventually(lambda: len(server.workers()["aggregated-0"].get("ffn_links", {})) == 2)
    assert complete(server, SHORT) == greedy(oracle, SHORT)
    eventually(lambda: counts(server, "aggregated-0")["holds_weights"] == 0)


@pytest.mark.parametrize(
    ("name", "topology", "changes"),
    [
        ("mixtral", "1a1f", ()),
        ("gpt_oss", "1p1a2f", ("pools.decode.ffn.split=expert", "router.local_prefill=fallback")),
    ],
)
def test_other_families_and_topologies(name: str, topology: str, changes: tuple[str, ...], tmp_path: Path) -> None:
    oracle = tiny_model(name).float().eval()
    with serving(oracle, tmp_path / name, topology, *changes) as server:
        assert complete(server, SHORT) == greedy(oracle, SHORT)
        attention = "decode-0" if "p" in topology else "aggregated-0"
        eventually(lambda: counts(server, attention).get("calls", 0) > 0)
        assert counts(server, attention)["computed_here"] == 0


def test_with_all_experts_on_both_workers_one_of_them_is_enough(tmp_path: Path) -> None:
    oracle = tiny_model("mixtral").float().eval()
    with serving(oracle, tmp_path / "mixtral", "1a2f", "pools.aggregated.ffn.fallback=error") as server:
        assert complete(server, LENGTHS, lambda: server.kill("ffn-1")) == greedy(oracle, LENGTHS)
        eventually(lambda: counts(server, "aggregated-0").get("calls", 0) > 0)
        assert counts(server, "aggregated-0")["computed_here"] == 0
