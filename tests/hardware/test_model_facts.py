"""What follows from a model's dimensions, against what is published and against sums written out here."""

from __future__ import annotations

import math

import msgspec
import pytest

from transload.arch import ModelArch
from transload.errors import DeploymentError
from transload.hardware.catalog import load_model, model_names
from transload.hardware.model_facts import (
    attention_flops_per_pair,
    count_parameters,
    decode_flops,
    decode_intensity,
    decode_read_bytes,
    experts_touched,
    head_flops,
    kv_bytes,
    kv_bytes_per_token,
    kv_elements_per_token_layer,
    linear_flops_per_token,
    prefill_flops,
    prefill_intensity,
    weight_bytes,
)
from transload.hardware.precision import Precision, parse_dtype, with_kv, with_weights


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-2-70b", 68_976_648_192),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("deepseek-v3", 671_026_419_200),
        ("mixtral-8x7b", 46_702_792_704),
        ("gpt-oss-120b", 116_829_156_672),
        ("smollm2-135m", 134_515_008),
        ("mistral-7b", 7_241_732_096),
        ("yi-34b", 34_388_917_248),
        ("opt-13b", 12_853_473_280),
    ],
)
def test_parameters_are_counted_to_the_unit(model: str, parameters: int) -> None:
    assert count_parameters(load_model(model)).total == parameters


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        ("deepseek-v3", 671e9, 37e9),
        ("qwen3-235b-a22b", 235e9, 22e9),
        ("mixtral-8x7b", 46.7e9, 12.9e9),
        ("gpt-oss-120b", 116.83e9, 5.13e9),
        ("kimi-k2", 1.03e12, 32e9),
        ("step-3", 316e9, 38e9),
    ],
)
def test_total_and_active_parameters_are_those_that_mixtures_are_named_after(
    model: str, total: float, active: float
) -> None:
    count = count_parameters(load_model(model))
    assert count.total == pytest.approx(total, rel=0.005)
    assert count.active == pytest.approx(active, rel=0.025)


@pytest.mark.parametrize("name", model_names())
def test_counts_agree_with_what_the_makers_publish(name: str) -> None:
    card = load_model(name)
    count = count_parameters(card)
    if card.published.total is not None:
        assert count.total == pytest.approx(card.published.total.value, rel=0.015)
    if card.published.active is not None:
        assert count.active == pytest.approx(card.published.active.value, rel=0.025)
    parts = [getattr(count, field) for field in count.__struct_fields__ if field not in ("total", "active")]
    assert sum(parts) == count.total


@pytest.mark.parametrize(
    ("model", "kv"),
    [
        ("llama-3-8b", 131_072),
        ("llama-3-70b", 327_680),
        ("llama-3.1-405b", 516_096),
        ("qwen3-8b", 147_456),
        ("qwen3-235b-a22b", 192_512),
        ("deepseek-v3", 61 * 576 * 2),
        ("kimi-k2", 70_272),
        ("mixtral-8x7b", 131_072),
        ("smollm2-135m", 23_040),
        ("opt-66b", 2_359_296),
        ("step-3", 62_464),
        ("gpt-oss-120b", 73_728),
    ],
)
def test_kv_bytes_of_a_token_in_sixteen_bits(model: str, kv: int) -> None:
    assert kv_bytes_per_token(load_model(model), "bfloat16") == kv
    assert kv_bytes_per_token(load_model(model), "fp8") == kv // 2


def test_kv_of_published_examples() -> None:
    """DistServe (OPT-66B, 512 tokens), HACK (Qwen3-8B, 4,096 tokens), Mooncake (Llama-3-70B, 128 k tokens)."""
    assert kv_bytes(load_model("opt-66b"), 512) == 1.125 * 2**30
    assert kv_bytes(load_model("qwen3-8b"), 4096) == 576 * 2**20
    assert kv_bytes(load_model("llama-3-70b"), 131_072) == 40 * 2**30


def test_a_latent_cache_does_not_grow_with_heads() -> None:
    assert kv_elements_per_token_layer(load_model("deepseek-v3")) == 576
    assert kv_elements_per_token_layer(load_model("kimi-k2")) == 576


def test_sliding_layers_keep_their_window_and_no_more() -> None:
    card = load_model("gpt-oss-120b")
    cell = 2 * 8 * 64 * 2
    assert kv_bytes(card, 100) == 36 * 100 * cell
    assert kv_bytes(card, 10_000) == 18 * 10_000 * cell + 18 * 128 * cell
    assert kv_bytes(load_model("mistral-7b"), 100_000) == kv_bytes(load_model("mistral-7b"), 4096)


def test_the_model_that_runs_for_real_is_counted_alike() -> None:
    """The runtime's own description of a model and the catalog's must not drift apart."""
    card = load_model("smollm2-135m-instruct")
    arch = ModelArch(
        name="smollm2", family="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_layers=30,
        num_heads=9, num_kv_heads=3, head_dim=64, max_position=8192, tied_embeddings=True,
    )  # fmt: skip
    assert count_parameters(card).total == arch.num_parameters()
    assert kv_bytes_per_token(card, "float32") == arch.kv_bytes_per_token("float32")


def test_weights_take_the_bytes_of_the_format_of_each_part() -> None:
    llama = load_model("llama-3-8b")
    assert weight_bytes(llama) == 2 * 8_030_261_248
    fp8 = with_weights(llama.precision, "fp8")
    small = count_parameters(llama)
    kept = small.input_embedding + small.output_head + small.norms
    assert weight_bytes(llama, fp8) == small.total + kept
    assert weight_bytes(llama, with_weights(llama.precision, "float32")) == 4 * 8_030_261_248


def test_stored_sizes_are_those_of_the_published_checkpoints() -> None:
    """gpt-oss-120b: 60.8 GiB in its model card. DeepSeek-V3: FP8 weights of 671 B and 16-bit embeddings."""
    assert weight_bytes(load_model("gpt-oss-120b")) / 2**30 == pytest.approx(60.8, rel=0.005)
    assert weight_bytes(load_model("deepseek-v3")) == pytest.approx(671.03e9 + 0.927e9 * 2 + 0.107e9, rel=1e-3)


def test_ffn_flops_of_step_3_and_deepseek_are_those_of_the_step_3_report() -> None:
    """The report's table: 5.33e10 and 4.84e10 FLOPs a token in the feed-forward layers (without routers)."""
    for model, flops in (("step-3", 5.33e10), ("deepseek-v3", 4.84e10)):
        card = load_model(model)
        count = count_parameters(card)
        assert card.experts is not None
        routed = count.routed_experts * card.experts.per_token / card.experts.num_experts
        assert 2 * (routed + count.shared_experts + count.dense_ffn) == pytest.approx(flops, rel=0.002)


def test_decode_flops_of_llama_written_out() -> None:
    card = load_model("llama-3-8b")
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    assert linear_flops_per_token(card) == 2 * matrices
    assert head_flops(card) == 2 * 4096 * 128_256
    attention = 32 * 4 * 32 * 128 * 1000
    assert decode_flops(card, 1000) == 2 * matrices + attention + 2 * 4096 * 128_256


@pytest.mark.parametrize("model", ["llama-3-8b", "gpt-oss-120b", "mistral-7b"])
@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (7, 0), (200, 0), (50, 100), (5000, 0), (3, 4094), (10, 9000)])
def test_prefill_flops_are_the_sum_over_its_tokens(model: str, tokens: int, cached: int) -> None:
    card = load_model(model)
    logits = head_flops(card)
    one_by_one = sum(decode_flops(card, cached + position) - logits for position in range(1, tokens + 1))
    assert prefill_flops(card, tokens, cached) == one_by_one + logits


def test_chunks_of_a_prefill_add_up() -> None:
    card = load_model("llama-3-8b")
    whole = prefill_flops(card, 3000)
    chunks = prefill_flops(card, 1000) + prefill_flops(card, 1000, 1000) + prefill_flops(card, 1000, 2000)
    assert chunks == whole + 2 * head_flops(card)


def test_latent_attention_decodes_absorbed_and_prefills_expanded() -> None:
    card = load_model("deepseek-v3")
    assert attention_flops_per_pair(card) == 2 * 128 * (192 + 128)
    assert attention_flops_per_pair(card, absorbed=True) == 2 * 128 * (576 + 512)
    expansion = 61 * 2 * 512 * 128 * (128 + 128)
    fresh = prefill_flops(card, 10)
    pairs = 61 * 10 * 1000 * 2 * 128 * (192 + 128)
    assert prefill_flops(card, 10, 1000) == fresh + pairs + 1000 * expansion


def test_experts_touched_by_a_batch() -> None:
    assert experts_touched(256, 8, 1) == pytest.approx(8)
    assert experts_touched(256, 8, 64) == pytest.approx(256 * (1 - (1 - 8 / 256) ** 64))
    assert experts_touched(256, 8, 0) == 0
    assert experts_touched(8, 8, 1) == 8
    assert experts_touched(128, 8, 1e6) == pytest.approx(128)


@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0, 2.5])
def test_one_token_touches_k_experts_whatever_the_skew(skew: float) -> None:
    for experts, per_token in ((256, 8), (8, 2), (48, 3), (128, 4)):
        assert experts_touched(experts, per_token, 1, skew) == pytest.approx(per_token)


def test_skew_lets_a_batch_share_experts() -> None:
    touched = [experts_touched(256, 8, 64, skew) for skew in (0.0, 0.5, 1.0, 2.0)]
    assert touched == sorted(touched, reverse=True)
    assert touched[0] > touched[1] > touched[2] > touched[3] > 8


@pytest.mark.parametrize("arguments", [(8, 9, 1, 0.0), (8, 0, 1, 0.0), (8, 2, -1, 0.0), (8, 2, 1, -1.0)])
def test_experts_touched_refuses_nonsense(arguments: tuple[int, int, int, float]) -> None:
    with pytest.raises(DeploymentError, match="experts touched"):
        experts_touched(*arguments)


def test_a_decode_step_reads_only_the_experts_it_touches() -> None:
    card = load_model("mixtral-8x7b")
    count = count_parameters(card)
    without = count.attention + count.router + count.norms + count.output_head
    expert = count.routed_experts / 8
    assert decode_read_bytes(card, 1, 0) == pytest.approx(2 * (without + 2 * expert))
    assert decode_read_bytes(card, 100_000, 0) == pytest.approx(2 * (without + 8 * expert))
    assert decode_read_bytes(card, 1, 1000) - decode_read_bytes(card, 1, 0) == pytest.approx(131_072 * 1000)


def test_decoding_a_dense_model_at_batch_one_is_about_one_flop_a_byte() -> None:
    card = load_model("llama-3-8b")
    assert decode_intensity(card, 1, 1) == pytest.approx(1.0, rel=0.01)
    assert decode_intensity(card, 64, 1) == pytest.approx(64.0, rel=0.02)
    assert decode_intensity(card, 64, 8192) < 16


def test_a_long_prefill_is_far_above_the_ridge_point_of_any_chip() -> None:
    card = load_model("llama-3-8b")
    assert prefill_intensity(card, 4096) > 2000
    assert prefill_intensity(card, 1) < 2


def test_a_tied_head_is_read_and_multiplied_once() -> None:
    card = load_model("smollm2-135m")
    untied = msgspec.structs.replace(card, tied_embeddings=False)
    table = 49_152 * 576
    assert count_parameters(untied).total == count_parameters(card).total + table
    assert count_parameters(untied).active == count_parameters(card).active
    assert decode_flops(untied, 10) == decode_flops(card, 10)
    assert decode_read_bytes(untied, 1, 10) == decode_read_bytes(card, 1, 10)


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", "bfloat16"), ("torch.float16", "float16"), ("FP8", "fp8"), ("fp4", "nvfp4"), ("mxfp4", "mxfp4")],
)
def test_number_formats_by_their_usual_names(word: str, dtype: str) -> None:
    assert parse_dtype(word) == dtype


def test_an_unknown_number_format_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(DeploymentError, match='no such number format: bf61; did you mean "bf16"'):
        parse_dtype("bf61")


def test_kv_can_be_smaller_than_the_weights() -> None:
    precision = with_kv(Precision(), "fp8")
    card = msgspec.structs.replace(load_model("llama-3-8b"), precision=precision)
    assert kv_bytes_per_token(card) == 65_536
    assert weight_bytes(card) == 2 * 8_030_261_248
    assert math.isclose(kv_bytes(card, 10), 655_360)
