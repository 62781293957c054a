"""Any config.json: the spellings of several families, and what cannot be counted is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from transload.errors import DeploymentError
from transload.hardware.model_card import Gqa, Mla, ModelCard, Provenance
from transload.hardware.model_config import read_config
from transload.hardware.model_facts import count_parameters

DENSE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}


def read(**changes: Any) -> ModelCard:
    keys = {key: value for key, value in {**DENSE, **changes}.items() if value != "gone"}
    provenance = Provenance(source=("test",), kind="datasheet")
    return read_config(keys, model_id="m", name="M", provenance=provenance, where="config.json")


def refusal(**changes: Any) -> str:
    with pytest.raises(DeploymentError) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json: ")
    return str(caught.value)


def test_a_plain_config() -> None:
    card = read()
    assert card.attention == Gqa(num_heads=4, num_kv_heads=2, head_dim=16)
    assert (card.ffn_size, card.experts, card.tied_embeddings, card.remarks) == (128, None, False, ())


def test_without_key_value_heads_every_head_has_its_own() -> None:
    assert read(num_key_value_heads="gone").attention == Gqa(num_heads=4, num_kv_heads=4, head_dim=16)


def test_qwen3_has_heads_of_128_unless_it_says_otherwise() -> None:
    card = read(model_type="qwen3")
    assert isinstance(card.attention, Gqa)
    assert card.attention.head_dim == 128
    assert card.extras.qk_norm
    assert read(model_type="qwen2").extras.qkv_bias


@pytest.mark.parametrize(
    ("keys", "expert_layers"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, (True,) * 4),
        ({"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2}, (False, True, False, True)),
        ({"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 3}, (False, False, False, True)),
        ({"moe_num_experts": 8, "moe_top_k": 2, "moe_layers_enum": "1,2"}, (False, True, True, False)),
    ],
)
def test_which_layers_have_experts(keys: dict[str, Any], expert_layers: tuple[bool, ...]) -> None:
    card = read(moe_intermediate_size=32, **keys)
    assert card.experts is not None
    assert (card.experts.num_experts, card.experts.per_token, card.experts.expert_size) == (8, 2, 32)
    assert card.expert_layers == expert_layers
    assert card.ffn_size == (None if all(expert_layers) else 128)


def test_shared_experts_by_number_or_by_width() -> None:
    moe = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    by_number = read(**moe, n_shared_experts=2).experts
    assert by_number is not None
    assert (by_number.num_shared, by_number.shared_size) == (2, 64)
    by_width = read(model_type="qwen2_moe", **moe, shared_expert_intermediate_size=96).experts
    assert by_width is not None
    assert (by_width.num_shared, by_width.shared_size, by_width.shared_gate) == (1, 96, True)


def test_latent_attention_with_and_without_a_query_bottleneck() -> None:
    mla = {"kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 4, "v_head_dim": 12}
    attention = read(model_type="deepseek_v2", **mla, q_lora_rank=None).attention
    assert attention == Mla(
        num_heads=4, query_rank=None, kv_rank=8, nope_head_dim=16, rope_head_dim=4, value_head_dim=12
    )
    with_rank = read(model_type="deepseek_v2", **mla, q_lora_rank=24)
    per_layer = 64 * 24 + 24 * 4 * 20 + 64 * 12 + 8 * 4 * 28 + 4 * 12 * 64
    assert count_parameters(with_rank).attention == 4 * per_layer


@pytest.mark.parametrize(
    ("keys", "window", "slides"),
    [
        ({}, None, ()),
        ({"model_type": "mistral", "sliding_window": 8}, 8, (True,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 8}, None, ()),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            8,
            (False, False, False, True),
        ),
        ({"model_type": "gpt_oss", "sliding_window": 8, "head_dim": 16}, 8, (True, False, True, False)),
        ({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 4}, 8, (True, True, True, False)),
        (
            {"sliding_window": 8, "layer_types": ["full_attention"] + ["sliding_attention"] * 3},
            8,
            (False, True, True, True),
        ),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 4}, None, ()),
    ],
)
def test_which_layers_slide(keys: dict[str, Any], window: int | None, slides: tuple[bool, ...]) -> None:
    card = read(**keys)
    assert (card.sliding_window, card.sliding_layers) == (window, slides)


@pytest.mark.parametrize(
    ("quantization", "attention", "experts", "kv"),
    [
        (None, "bfloat16", "bfloat16", "bfloat16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "fp8", "bfloat16"),
        ({"quant_method": "mxfp4"}, "bfloat16", "mxfp4", "bfloat16"),
        ({"quant_method": "gptq", "bits": 4}, "int4", "int4", "bfloat16"),
        ({"quant_method": "awq", "bits": 8}, "int8", "int8", "bfloat16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "nvfp4", "nvfp4", "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
            "fp8",
            "bfloat16",
        ),
    ],
)
def test_number_formats_of_quantised_checkpoints(quantization: object, attention: str, experts: str, kv: str) -> None:
    precision = read(quantization_config=quantization).precision
    assert (precision.attention, precision.experts, precision.embeddings, precision.kv) == (
        attention,
        experts,
        "bfloat16",
        kv,
    )


def test_what_is_taken_for_granted_is_remarked() -> None:
    assert read(torch_dtype="gone").remarks == ("the config states no dtype: counted as bfloat16",)
    assert "model_type wonder is not known here" in read(model_type="wonder").remarks[0]
    assert "multi-token-prediction" in read(num_nextn_predict_layers=1).remarks[0]
    assert "indexer is not counted" in read(index_topk=2048).remarks[0]


def test_the_language_model_inside_a_multimodal_config_is_taken() -> None:
    card = read_config(
        {
            "model_type": "vlm",
            "torch_dtype": "float16",
            "text_config": dict(DENSE, torch_dtype=None) | {"dtype": "float16"},
        },
        model_id="m",
        name="M",
        provenance=Provenance(source=("test",), kind="datasheet"),
        where="config.json",
    )
    assert (card.hidden_size, card.precision.attention) == (64, "float16")
    assert "only the language model is counted" in card.remarks


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": "gone"}, "hidden_size (or n_embd, d_model) is missing; wanted a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64', wanted a whole number from 1 to"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads evenly"),
        ({"num_attention_heads": 128, "num_key_value_heads": 8}, "hidden_size 64 is smaller than 128 attention heads"),
        ({"is_encoder_decoder": True}, "only decoders can be counted"),
        ({"model_type": "falcon"}, "models of type falcon cannot be counted yet"),
        ({"mamba_d_state": 16}, "mamba_d_state means state-space layers"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types has linear_attention"),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"num_experts": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 8}, "8 experts per token, but only 4"),
        ({"num_experts": 4, "moe_intermediate_size": 8}, "num_experts_per_tok"),
        ({"moe_num_experts": 4, "moe_top_k": 1, "moe_layers_enum": "a,b"}, "moe_layers_enum is 'a,b'"),
        ({"num_experts": 4, "num_experts_per_tok": 1, "mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', wanted true or false"),
        ({"torch_dtype": 16}, "torch_dtype is 16, wanted a name such as bfloat16"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8', wanted an object"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method is magic"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3-bit int weights; known: 4 and 8 bits"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(**changes)
