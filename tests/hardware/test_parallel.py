"""Shares of a chip: what is split, what is copied, and which splits are refused."""

from __future__ import annotations

import pytest

from transload.errors import DeploymentError
from transload.hardware.catalog import load_model, model_names
from transload.hardware.model_facts import count_parameters, kv_bytes_per_token, weight_bytes
from transload.hardware.parallel import Parallel, share_of_chip, stage_layers


@pytest.mark.parametrize("name", model_names())
def test_one_chip_holds_everything(name: str) -> None:
    card = load_model(name)
    share = share_of_chip(card, Parallel())
    assert share.weight_bytes == pytest.approx(weight_bytes(card), abs=2)
    assert share.kv_bytes_per_token == kv_bytes_per_token(card)
    assert (share.num_layers, share.kv_copies) == (card.num_layers, 1)


def test_tensor_parallelism_splits_weights_and_kv_heads_but_not_norms() -> None:
    card = load_model("llama-3-70b")
    norms = 2 * count_parameters(card).norms
    share = share_of_chip(card, Parallel(tensor=8))
    assert share.weight_bytes == pytest.approx((weight_bytes(card) - norms) / 8 + norms, abs=2)
    assert (share.kv_bytes_per_token, share.kv_copies) == (327_680 // 8, 1)


def test_beyond_one_head_a_chip_the_cache_is_copied() -> None:
    share = share_of_chip(load_model("llama-3-70b"), Parallel(tensor=16))
    assert (share.kv_bytes_per_token, share.kv_copies) == (327_680 // 8, 2)


def test_a_latent_cache_is_whole_on_every_tensor_rank() -> None:
    card = load_model("deepseek-v3")
    assert share_of_chip(card, Parallel(tensor=8)).kv_bytes_per_token == kv_bytes_per_token(card)
    assert share_of_chip(card, Parallel(tensor=8)).kv_copies == 8
    assert share_of_chip(card, Parallel(data_attention=8, expert=8)).kv_copies == 1


def test_attention_by_data_copies_attention_and_deals_out_experts() -> None:
    card = load_model("deepseek-v3")
    count = count_parameters(card)
    share = share_of_chip(card, Parallel(data_attention=32, expert=32))
    ends = 2 * (count.input_embedding + count.output_head + count.norms + count.router)
    copied = count.attention + count.dense_ffn + count.shared_experts + ends
    assert share.weight_bytes == pytest.approx(copied + count.routed_experts / 32, abs=2)


def test_experts_are_split_by_expert_or_within_alike() -> None:
    card = load_model("mixtral-8x7b")
    by_expert = share_of_chip(card, Parallel(tensor=8, expert=8))
    within = share_of_chip(card, Parallel(tensor=8, expert=1))
    assert by_expert.weight_bytes == within.weight_bytes
    assert Parallel(tensor=8, expert=2).expert_tensor == 4


def test_pipeline_stages_have_layers_in_order_and_as_even_as_can_be() -> None:
    assert stage_layers(10, 4) == [range(0, 3), range(3, 6), range(6, 8), range(8, 10)]
    share = share_of_chip(load_model("llama-3-70b"), Parallel(pipeline=4))
    assert share.num_layers == 20
    assert share.kv_bytes_per_token == 327_680 // 4
    assert (
        weight_bytes(load_model("llama-3-70b")) / 4 < share.weight_bytes < weight_bytes(load_model("llama-3-70b")) / 3
    )


def test_the_fullest_stage_is_the_one_with_most_expert_layers() -> None:
    """61 layers in two stages: the first has 3 dense layers and 28 with experts, the second 30 with experts."""
    card = load_model("deepseek-v3")
    count = count_parameters(card)
    share = share_of_chip(card, Parallel(pipeline=2))
    experts = (count.routed_experts + count.shared_experts) * 30 / 58
    assert share.weight_bytes == pytest.approx(experts + count.attention * 30 / 61 + 2 * count.output_head, rel=0.001)


@pytest.mark.parametrize(
    ("model", "parallel", "complaint"),
    [
        ("llama-3-8b", Parallel(tensor=3), "32 heads cannot be split 3 ways"),
        ("llama-3-8b", Parallel(pipeline=33), "32 layers cannot fill 33 pipeline stages"),
        ("llama-3-8b", Parallel(tensor=2, expert=2), "it has no experts, so expert must be 1, not 2"),
        ("mixtral-8x7b", Parallel(tensor=8, expert=3), "expert = 3 must divide the 8 chips of a stage"),
        ("mixtral-8x7b", Parallel(tensor=16, expert=16), "8 experts cannot be dealt out to 16 evenly"),
        ("llama-3-8b", Parallel(tensor=0), "tensor is 0, wanted at least 1"),
    ],
)
def test_a_split_that_does_not_divide_is_refused_by_name(model: str, parallel: Parallel, complaint: str) -> None:
    with pytest.raises(DeploymentError, match=complaint):
        share_of_chip(load_model(model), parallel)


def test_the_chips_of_a_worker() -> None:
    assert Parallel(tensor=2, data_attention=4, pipeline=3, expert=8).num_chips == 24
