"""Reads a Hugging Face `config.json` into a `ModelArch`, with the defaults that `transformers` gives to missing keys.

What would change the computation and is not implemented is refused by name; what does not matter is not looked at.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

from transload.arch import ModelArch, Rope, RopeKind
from transload.errors import CheckpointError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)
DEFAULT_MAX_POSITION: dict[Family, int] = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
DEFAULT_KV_HEADS: dict[Family, int | None] = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
DEFAULT_WINDOW = 4096
LARGEST = 1 << 24
"""No dimension of a model is larger; it keeps a made-up file from asking for the whole memory."""


class _Config:
    """Typed access to the keys of one file."""

    def __init__(self, keys: dict[str, Any], where: str) -> None:
        self.keys = keys
        self.where = where

    def size(self, key: str, default: int | None = None) -> int:
        """A dimension: at least 1, at most `LARGEST`."""
        value = self.keys.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise CheckpointError(f"{self.where}: {key} is {value!r}, wanted a whole number from 1 to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.keys.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{self.where}: {key} is {value!r}, wanted a number above 0")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.keys.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.keys.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, wanted true or false")
        return value

    def refuse(self, key: str, plain: tuple[object, ...], why: str) -> None:
        """Refuse any value of `key` but the `plain` ones (and a missing key)."""
        if (value := self.keys.get(key)) is not None and value not in plain:
            raise CheckpointError(f"{self.where}: {key} is {value!r}: {why}")


def read_arch(keys: dict[str, Any], *, name: str, path: Path) -> ModelArch:
    """The architecture that a `config.json` describes. Raises `CheckpointError` if it is not implemented."""
    config = _Config(keys, str(path))
    family = _family(config)
    config.refuse("quantization_config", ({},), "quantised safetensors are not loaded; take the plain model or a GGUF")
    config.refuse("hidden_act", ("silu", "swish"), "only the silu activation is implemented")
    config.refuse("rope_interleaved", (False,), "only rotary embeddings in halves are implemented")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", _default_kv_heads(config, family, heads))
    head_dim = config.size("head_dim", 128 if family == "qwen3" else hidden // heads or None)
    attention_bias = config.flag("attention_bias")
    num_layers = config.size("num_hidden_layers")
    window, sliding = _sliding(config, family, num_layers)
    arch = ModelArch(
        name=name,
        family=family,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=config.size("max_position_embeddings", DEFAULT_MAX_POSITION[family]),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_rope(config, family),
        tied_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and attention_bias),
        output_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and config.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        sliding_window=window,
        sliding_layers=sliding,
    )
    return checked(arch, str(path))


def checked(arch: ModelArch, where: str) -> ModelArch:
    """Refuse dimensions that no model has, whichever file they come from."""
    if arch.num_heads % arch.num_kv_heads:
        raise CheckpointError(
            f"{where}: {arch.num_heads} attention heads cannot share {arch.num_kv_heads} key/value heads evenly"
        )
    if arch.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim is {arch.head_dim}, wanted an even number (rotary embedding)")
    if arch.num_layers > 10_000:
        raise CheckpointError(f"{where}: {arch.num_layers} layers; the file is damaged")
    return arch


def context_length(arch: ModelArch) -> int:
    """Longest prompt plus output the model is made for, in tokens, with what its rotary scaling adds."""
    rope = arch.rope
    if rope.kind == "yarn":
        scaled = max(arch.max_position, (rope.original_max_position or arch.max_position) * rope.factor)
    elif rope.kind in ("linear", "dynamic"):
        scaled = arch.max_position * rope.factor
    else:
        scaled = arch.max_position
    return round(min(scaled, LARGEST))


def _family(config: _Config) -> Family:
    model_type = config.keys.get("model_type")
    for family in FAMILIES:
        if model_type == family:
            return family
    raise CheckpointError(
        f"{config.where}: model_type is {model_type!r} (architectures: {config.keys.get('architectures')!r}), "
        f"wanted one of {', '.join(FAMILIES)}"
    )


def _default_kv_heads(config: _Config, family: Family, heads: int) -> int:
    """A missing key means the family's default; an explicit null means one key/value head per head."""
    default = DEFAULT_KV_HEADS[family]
    return heads if default is None or "num_key_value_heads" in config.keys else default


def _sliding(config: _Config, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """Sliding window in tokens and which layers have it."""
    if family == "llama" or (family in ("qwen2", "qwen3") and not config.flag("use_sliding_window")):
        return None, None
    if config.keys.get("sliding_window", DEFAULT_WINDOW) is None:
        return None, None
    window = config.size("sliding_window", DEFAULT_WINDOW)
    kinds = config.keys.get("layer_types")
    if kinds is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise CheckpointError(
                f"{config.where}: layer_types is {str(kinds)[:200]}, wanted one of {' or '.join(known)} for each layer"
            )
        slides = tuple(kind == "sliding_attention" for kind in kinds)
    elif family == "mistral":
        return window, None
    else:
        first = config.keys.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise CheckpointError(f"{config.where}: max_window_layers is {first!r}, wanted a whole number")
        slides = tuple(layer >= first for layer in range(num_layers))
    if not any(slides):
        return None, None
    return window, None if all(slides) else slides


def _rope(config: _Config, family: Family) -> Rope:
    """Rotary embedding, in the spelling of old files (`rope_theta`, `rope_scaling`) or of new ones."""
    scaling = config.keys.get("rope_scaling") or config.keys.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{config.where}: rope_parameters is {scaling!r}, wanted an object")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise CheckpointError(f"{config.where}: rope_parameters that differ by layer type are not implemented")
    rope = _Config({"rope_theta": config.keys.get("rope_theta"), **scaling}, f"{config.where}: rope_parameters")
    for keys in (config, rope):
        keys.refuse("partial_rotary_factor", (1, 1.0), "only rotary embedding of whole heads is implemented")
    named = rope.keys.get("rope_type") or rope.keys.get("type") or "default"
    kind: RopeKind | None = next((kind for kind in get_args(RopeKind) if kind == named), None)
    if kind is None:
        raise CheckpointError(f"{rope.where}: rope_type is {named!r}, wanted one of {', '.join(get_args(RopeKind))}")
    original, default_factor = None, None
    if kind in ("llama3", "yarn"):
        # transformers: a key at the top wins over the one inside, and the longest position stands in for both.
        longest = config.size("max_position_embeddings", DEFAULT_MAX_POSITION[family])
        inside = rope.size("original_max_position_embeddings", longest)
        original = config.size("original_max_position_embeddings", inside)
        default_factor = longest / original if kind == "yarn" else None
    return Rope(
        theta=rope.number("rope_theta", 10_000.0),
        kind=kind,
        factor=1.0 if kind == "default" else rope.number("factor", default_factor),
        original_max_position=original,
        low_freq_factor=rope.number("low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=rope.number("high_freq_factor", None if kind == "llama3" else 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
