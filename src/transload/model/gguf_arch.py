"""Reads GGUF metadata into a `ModelArch`, and llama.cpp's tensor names into Hugging Face's. No torch."""

from __future__ import annotations

import math
import re

import numpy as np

from transload.arch import ModelArch, Rope
from transload.errors import CheckpointError
from transload.model.gguf_file import GgufFile, GgufTensor
from transload.model.hf_config import LARGEST, Family, checked

ARCHITECTURES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF architecture -> family. llama.cpp stores Mistral as llama."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
IGNORED = re.compile(r"rope_freqs\.weight$|blk\.\d+\.attn_rot_embd$|blk\.\d+\.rope_freqs\.weight$")
IN_LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")

LLAMA3_FACTORS = (1.0, 4.0)
"""low_freq_factor and high_freq_factor of every published Llama 3."""
LLAMA3_ORIGINAL = 8192


def hugging_face_name(name: str) -> str | None:
    """llama.cpp's tensor name in Hugging Face's spelling; as it is if unknown; None if it holds derived numbers."""
    if IGNORED.fullmatch(name):
        return None
    stem, _, kind = name.rpartition(".")
    if stem in TOP and kind in ("weight", "bias"):
        return f"{TOP[stem]}.{kind}"
    match = IN_LAYER.fullmatch(name)
    if match is None or match[2] not in LAYER:
        return name
    return f"model.layers.{int(match[1])}.{LAYER[match[2]]}.{match[3]}"


def renamed(file: GgufFile) -> dict[str, GgufTensor]:
    """The file's tensors by Hugging Face name, without the derived ones."""
    return {found: tensor for name, tensor in file.tensors.items() if (found := hugging_face_name(name)) is not None}


def read_gguf_arch(file: GgufFile, *, name: str) -> ModelArch:
    """The architecture of a GGUF model. Raises `CheckpointError` if it is not one of the Llama family."""
    where = str(file.path)
    family = ARCHITECTURES.get(file.architecture)
    if family is None:
        raise CheckpointError(
            f"{where}: architecture {file.architecture!r} is not implemented, wanted one of {', '.join(ARCHITECTURES)}"
        )
    if file.integer(f"{family}.expert_count", 0):
        raise CheckpointError(
            f"{where}: a mixture of experts, which is loaded from safetensors only; take those, or a dense model"
        )
    heads = _size(file, f"{family}.attention.head_count")
    hidden = _size(file, f"{family}.embedding_length")
    head_dim = _size(file, f"{family}.attention.key_length", hidden // heads)
    _refuse_unlike(file, f"{family}.attention.value_length", head_dim, "values as wide as keys")
    _refuse_unlike(file, f"{family}.rope.dimension_count", head_dim, "rotary embedding of whole heads")
    window = file.integer(f"{family}.attention.sliding_window", 0)
    max_position = _size(file, f"{family}.context_length")
    arch = ModelArch(
        name=name,
        family=family,
        vocab_size=_rows(file, "token_embd.weight"),
        hidden_size=hidden,
        intermediate_size=_size(file, f"{family}.feed_forward_length"),
        num_layers=_size(file, f"{family}.block_count"),
        num_heads=heads,
        num_kv_heads=_size(file, f"{family}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=_positive(file, f"{family}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file, family, head_dim, max_position),
        tied_embeddings="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm=family == "qwen3",
        sliding_window=window if 0 < window < max_position else None,
    )
    return checked(arch, where)


def _rope(file: GgufFile, family: str, head_dim: int, max_position: int) -> Rope:
    """Rotary embedding. Llama 3's scaling is stored as one factor per frequency; the others by name."""
    theta = _positive(file, f"{family}.rope.freq_base", 10_000.0)
    if ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, theta, head_dim)
    kind = file.text(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return Rope(theta=theta)
    factor = _positive(file, f"{family}.rope.scaling.factor", 1.0)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        _refuse_unlike(file, f"{family}.rope.scaling.attn_factor", 1.0, "YaRN's own attention factor")
        return Rope(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_position=_size(file, f"{family}.rope.scaling.original_context_length", max_position),
            beta_fast=_positive(file, f"{family}.rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=_positive(file, f"{family}.rope.scaling.yarn_beta_slow", 1.0),
        )
    raise CheckpointError(f"{file.path}: rope scaling {kind!r} is not implemented, wanted none, linear or yarn")


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> Rope:
    """Find the parameters that made the stored factors, and make sure that they do make them."""
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} is {tensor.kind} {list(tensor.shape)}, wanted F32 [{head_dim // 2}]"
        )
    stored = file.array(tensor).view("<f4").astype(np.float64)
    if not np.isfinite(stored).all() or stored.min() < 1.0:
        raise CheckpointError(f"{file.path}: {ROPE_FACTORS} holds factors below 1; the file is damaged")
    low, high = LLAMA3_FACTORS
    rope = Rope(
        theta=theta,
        kind="llama3",
        factor=float(stored.max()),
        original_max_position=LLAMA3_ORIGINAL,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    if not np.allclose(llama3_factors(rope, head_dim), stored, rtol=1e-3):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} does not follow Llama 3's rule (low {low}, high {high}, original context "
            f"{LLAMA3_ORIGINAL}), and other rules are not implemented; take the safetensors of the model"
        )
    return rope


def llama3_factors(rope: Rope, head_dim: int) -> list[float]:
    """By what each frequency is divided. The rule is that of Llama 3.1's release (`apply_scaling` in its model.py)."""
    original = rope.original_max_position or LLAMA3_ORIGINAL
    factors: list[float] = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope.theta ** (index / head_dim)
        if wavelength < original / rope.high_freq_factor:
            factors.append(1.0)
        elif wavelength > original / rope.low_freq_factor:
            factors.append(rope.factor)
        else:
            smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            factors.append(1 / ((1 - smooth) / rope.factor + smooth))
    return factors


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.integer(key, default)
    if not 1 <= value <= LARGEST:
        raise CheckpointError(f"{file.path}: {key} is {value}, wanted a whole number from 1 to {LARGEST}")
    return value


def _positive(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.number(key, default)
    if value <= 0:
        raise CheckpointError(f"{file.path}: {key} is {value}, wanted a number above 0")
    return value


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor {name!r} is missing; not a language model, or damaged")
    return file.tensors[name].shape[0]


def _refuse_unlike(file: GgufFile, key: str, wanted: float, what: str) -> None:
    if (got := file.number(key, wanted)) != wanted:
        raise CheckpointError(f"{file.path}: {key} is {got}, wanted {wanted}: only {what} is implemented")
