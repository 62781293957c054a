"""The numbers of `explain`, and that what is printed holds them."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from tests.deploy.test_placement import BFLOAT16_TOKEN, MIB, SMOLLM2, deployment, machine
from transload.arch import Experts
from transload.deploy.explain import Explanation, ModelFacts, explain
from transload.deploy.placement import plan_placement
from transload.deploy.show import show


def explained(topology: str, *changes: str) -> Explanation:
    placement = plan_placement(deployment(topology, *changes), machine(), SMOLLM2)
    facts = ModelFacts(name="smollm2", arch=SMOLLM2, stored_dtype="q4_1", stored_bytes=92 * MIB)
    return explain(placement, facts, f"topology {topology}")


def printed(explanation: Explanation) -> str:
    out = io.StringIO()
    show(explanation, Console(file=out, width=130))
    return out.getvalue()


def test_what_crosses_a_link_is_whole_blocks_in_frames() -> None:
    (link,) = explained("2p1d", "links=[{between: [prefill, decode], transport: shm}]").links
    assert link.bytes_per_token == BFLOAT16_TOKEN
    assert link.bytes_per_prompt == 1008 * BFLOAT16_TOKEN  # 63 blocks of 16
    assert link.frames_per_prompt == 2 * 6  # chunks of 512, 5 layers a frame
    assert link.shm_seconds == pytest.approx(link.bytes_per_prompt / 10e9)
    assert link.tcp_seconds == pytest.approx(link.bytes_per_prompt / 3e9)


def test_on_one_host_nothing_crosses_and_one_frame_says_that_all_is_there() -> None:
    explanation = explained("1p1d")
    (link,) = explanation.links
    assert (link.transport, link.frames_per_prompt) == ("direct", 1)
    assert "none over direct" in printed(explanation)


def test_what_a_worker_holds_is_told_in_tokens_and_contexts() -> None:
    worker = explained("1p1d", "pools.decode.memory=400 MiB").workers[1]
    assert worker.num_blocks == 400 * MIB // (16 * BFLOAT16_TOKEN)
    assert worker.kv_tokens == 16 * worker.num_blocks
    assert worker.full_contexts == pytest.approx(worker.kv_tokens / 8192)


def test_nothing_crosses_in_an_aggregated_deployment() -> None:
    explanation = explained("2agg")
    assert explanation.links == ()
    assert "nothing crosses between workers" in printed(explanation)


def test_people_are_shown_where_everything_runs_and_what_is_an_estimate() -> None:
    text = printed(explained("1p1d", "targets.ttft=2 s"))
    for words in ("prefill-0", "cpu, 1 thread on core 1", "720 MiB", "32,768 tokens", "22.5 KiB", "over shm"):
        assert words in text
    assert "time for it (estimate)" in text
    assert "TTFT within 2.00 s for 95% of requests" in text
    assert "fits this machine" in text


def test_what_does_not_fit_is_shown_with_the_reason() -> None:
    explanation = explained("1p1d", "pools.decode.memory=90 GiB")
    text = " ".join(printed(explanation).split())
    assert not explanation.fits
    assert 'does not fit pool "decode": 1 worker needs 90.' in text
    assert "fits this machine" not in text


def test_names_with_square_brackets_are_printed_as_they_are() -> None:
    facts = ModelFacts(name="[red]x[/red]", arch=SMOLLM2)
    explanation = explain(plan_placement(deployment("1agg"), machine(), SMOLLM2), facts, "[b].yaml")
    assert "[red]x[/red]" in printed(explanation)
    assert "[b].yaml" in printed(explanation)


def test_keys_of_the_api_are_never_shown() -> None:
    explanation = explained("1p1d", "server.api_keys=[sesame]")
    assert b"sesame" not in msgspec.json.encode(explanation)


def test_a_mixture_says_what_a_token_goes_through() -> None:
    experts = Experts(num_experts=16, per_token=4, intermediate_size=512)
    arch = msgspec.structs.replace(SMOLLM2, family="qwen3_moe", experts=experts)
    placement = plan_placement(deployment("2agg"), machine(), arch)
    explanation = explain(placement, ModelFacts(name="moe", arch=arch), "topology 2agg")
    one_expert = 3 * arch.hidden_size * 512
    unused = arch.num_layers * 12 * one_expert
    assert explanation.model.num_parameters - explanation.model.num_active_parameters == unused
    assert explanation.workers[0].weights_bytes >= 2 * arch.num_parameters()  # all lie in memory, used or not
    assert "4 of 16 experts" in printed(explanation)
