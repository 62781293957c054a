"""Tiny random models of each family, made by `transformers`, and saved as it saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
QWEN3_MOE = SHAPE | {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "truncate": False,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=64, head_dim=32),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32),
}
MIXTURES: dict[str, Any] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=True),
    "qwen3_moe-partly": lambda: Qwen3MoeConfig(
        **QWEN3_MOE | {"num_hidden_layers": 4}, attention_bias=True, decoder_sparse_step=2, mlp_only_layers=[1]
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-sliding": lambda: MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1, sliding_window=40),
    "gpt_oss": lambda: GptOssConfig(
        **SHAPE, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=24, rope_parameters=YARN
    ),
}
"""Models whose layers are mixtures of experts, of one only a layer in four."""


def tiny_model(name: str) -> Any:
    """A `PreTrainedModel`, whose own annotations are too narrow for what it does."""
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    model = make((CONFIGS | MIXTURES)[name]())
    for parameter in model.parameters():  # norms of one and biases of zero would hide a mix-up
        parameter.data.normal_()
    return model


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder
