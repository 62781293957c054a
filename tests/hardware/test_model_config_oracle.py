"""Parameter counts of tiny models of many families, against what `transformers` builds from the same config."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transload.hardware.model_card import Provenance
from transload.hardware.model_config import KNOWN, read_config
from transload.hardware.model_facts import count_parameters

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 16}
LATENT = {
    **BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
OLD = {key: value for key, value in BASE.items() if key not in ("intermediate_size", "hidden_size")}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", GROUPED, 0),
    ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 0),
    ("mistral", GROUPED, 0),
    ("mixtral", {**GROUPED, "num_local_experts": 4}, 0),
    ("qwen2", GROUPED, 0),
    ("qwen3", GROUPED, 0),
    ("qwen2_moe", {**GROUPED, **MIXTURE, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}, 0),
    ("qwen3_moe", {**GROUPED, **MIXTURE, "mlp_only_layers": [1]}, 0),
    ("deepseek_v2", {**LATENT, **SHARED}, 0),
    ("deepseek_v2", {**LATENT, **SHARED, "q_lora_rank": None}, 0),
    ("deepseek_v3", {**LATENT, **SHARED}, 3 * 8),
    ("glm4_moe", {**GROUPED, **SHARED, "use_qk_norm": True}, 3 * 8),
    ("gpt_oss", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, 0),
    ("opt", {**BASE, "ffn_dim": 96, "max_position_embeddings": 32, "word_embed_proj_dim": 64}, 0),
    ("gpt2", {**OLD, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 32}, 0),
    ("gpt_neox", BASE, 0),
    ("starcoder2", {**BASE, "num_key_value_heads": 2}, 0),
    ("gemma2", GROUPED, 0),
    ("gemma3_text", GROUPED, 0),
    ("granite", GROUPED, 0),
    ("phi3", {**BASE, "num_key_value_heads": 2}, 0),
    ("ernie4_5", GROUPED, 0),
]
"""Family, config, and how many weights we count more: routing biases, which `transformers` keeps as buffers."""


@pytest.mark.parametrize(("family", "changes", "buffers"), CASES, ids=[case[0] for case in CASES])
def test_parameters_are_those_of_the_model_that_transformers_builds(
    family: str, changes: dict[str, Any], buffers: int
) -> None:
    assert family in KNOWN
    config = AutoConfig.for_model(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    card = read_config(
        json.loads(config.to_json_string(use_diff=False)),
        model_id="tiny",
        name="Tiny",
        provenance=Provenance(source=("test",), kind="datasheet"),
        where="config.json",
    )
    assert count_parameters(card).total == sum(weight.numel() for weight in model.parameters()) + buffers
