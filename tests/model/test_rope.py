"""Frequencies and rotations against transformers, for every rope kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.model.tiny_models import SHAPE
from transload.arch import ModelArch, Rope
from transload.model.hf_config import read_arch
from transload.model.rope import RotaryEmbedding, attention_scaling, inverse_frequencies

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


def rope_config(name: str, **changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SHAPE, **changes}, rope_parameters={"rope_theta": 5_000.0, **ROPES[name]})


def arch_and_oracle(name: str) -> tuple[ModelArch, LlamaRotaryEmbedding]:
    config = rope_config(name)
    arch = read_arch(config.to_dict(), name="tiny", path=Path("config.json"))
    return arch, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_scaling_are_those_of_transformers(name: str) -> None:
    arch, oracle = arch_and_oracle(name)
    torch.testing.assert_close(inverse_frequencies(arch), oracle.inv_freq, rtol=1e-6, atol=0)
    assert attention_scaling(arch.rope) == pytest.approx(oracle.attention_scaling)


@pytest.mark.parametrize("name", ROPES)
def test_rotated_rows_are_those_of_transformers(name: str) -> None:
    arch, oracle = arch_and_oracle(name)
    num_heads = arch.num_heads + arch.num_kv_heads
    positions = torch.tensor([0, 1, 7, 63, 200, 511])
    x_THD = torch.randn(len(positions), num_heads, arch.head_dim, generator=torch.Generator().manual_seed(1))
    cos, sin = oracle(x_THD, positions[None])
    want, _ = apply_rotary_pos_emb(x_THD.transpose(0, 1)[None], x_THD.transpose(0, 1)[None], cos, sin)
    rotary = RotaryEmbedding(arch, torch.float32, torch.device("cpu"))
    got = rotary.at(positions, torch.full_like(positions, 512))(x_THD)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_dynamic_scaling_beyond_the_trained_length_is_that_of_transformers() -> None:
    """For a prompt longer than the model was trained for and the tokens after it, each with its own length."""
    arch, oracle = arch_and_oracle("dynamic")
    rotary = RotaryEmbedding(arch, torch.float32, torch.device("cpu"))
    x_THD = torch.ones(700, arch.num_heads + arch.num_kv_heads, arch.head_dim)
    prompt = torch.arange(700)
    cos, sin = oracle(x_THD, prompt[None])
    want, _ = apply_rotary_pos_emb(x_THD.transpose(0, 1)[None], x_THD.transpose(0, 1)[None], cos, sin)
    got = rotary.at(prompt, torch.full((700,), 700))(x_THD)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
    for position in (700, 701, 760):
        torch.testing.assert_close(
            inverse_frequencies(arch, position + 1),
            _after_growing(oracle, position),
            rtol=1e-5,
            atol=0,
        )


def _after_growing(oracle: LlamaRotaryEmbedding, position: int) -> torch.Tensor:
    oracle(torch.ones(1), torch.tensor([[position]]))
    grown: torch.Tensor = oracle.inv_freq
    return grown


def test_dynamic_rotations_do_not_depend_on_how_a_prompt_is_cut() -> None:
    arch, _ = arch_and_oracle("dynamic")
    rotary = RotaryEmbedding(arch, torch.float32, torch.device("cpu"))
    x_THD = torch.randn(600, arch.num_heads + arch.num_kv_heads, arch.head_dim)
    positions, lengths = torch.arange(600), torch.full((600,), 600)
    whole = rotary.at(positions, lengths)(x_THD).clone()
    for part in torch.split(torch.arange(600), 170):
        assert torch.equal(rotary.at(positions[part], lengths[part])(x_THD[part]), whole[part])


def test_a_position_beyond_the_table_makes_it_grow() -> None:
    arch = ModelArch(
        name="tiny",
        family="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position=100_000,
        rope=Rope(theta=10_000.0),
    )
    x_THD = torch.randn(1, 2, 8)
    far = torch.tensor([70_000])
    rotary = RotaryEmbedding(arch, torch.float32, torch.device("cpu"))
    low, high = x_THD.chunk(2, -1)
    angle = 70_000.0 * inverse_frequencies(arch)
    want = torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)
    torch.testing.assert_close(rotary.at(far, far)(x_THD), want, rtol=1e-5, atol=1e-5)
