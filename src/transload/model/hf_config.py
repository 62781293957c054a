"""Reads a Hugging Face `config.json` into a `ModelArch`, with the defaults that `transformers` gives to missing keys.

What would change the computation and is not implemented is refused by name; what does not matter is not looked at.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

from transload.arch import ClampedSwiglu, Experts, ModelArch, Rope, RopeKind
from transload.errors import CheckpointError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt_oss"]
FAMILIES: tuple[Family, ...] = get_args(Family)
DEFAULT_MAX_POSITION: dict[Family, int] = {
    "llama": 2048,
    "mistral": 131_072,
    "qwen2": 32_768,
    "qwen3": 32_768,
    "qwen3_moe": 32_768,
    "mixtral": 131_072,
    "gpt_oss": 131_072,
}
DEFAULT_KV_HEADS: dict[Family, int | None] = {
    "llama": None,
    "mistral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "qwen3_moe": 4,
    "mixtral": 8,
    "gpt_oss": 8,
}
DEFAULT_HEAD_DIM: dict[Family, int] = {"qwen3": 128, "gpt_oss": 64}
"""Other families share the hidden size among the heads."""
DEFAULT_NORM_EPS: dict[Family, float] = {"mixtral": 1e-5, "gpt_oss": 1e-5}
DEFAULT_THETA: dict[Family, float] = {"mixtral": 1e6, "gpt_oss": 150_000.0}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
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
    _refuse_quantisation(config, family)
    config.refuse("hidden_act", ("silu", "swish"), "only the silu activation is implemented")
    config.refuse("rope_interleaved", (False,), "only rotary embeddings in halves are implemented")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", _default_kv_heads(config, family, heads))
    head_dim = config.size("head_dim", DEFAULT_HEAD_DIM.get(family, hidden // heads or None))
    attention_bias = config.flag("attention_bias", family == "gpt_oss")
    has_bias = attention_bias and family in ("llama", "qwen3", "qwen3_moe", "gpt_oss")
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
        norm_eps=config.number("rms_norm_eps", DEFAULT_NORM_EPS.get(family, 1e-6)),
        rope=_rope(config, family),
        tied_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or has_bias,
        output_bias=has_bias,
        mlp_bias=family == "llama" and config.flag("mlp_bias"),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        sliding_window=window,
        sliding_layers=sliding,
        sinks=family == "gpt_oss",
        experts=_experts(config, family, num_layers),
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
    if arch.experts is not None and arch.experts.per_token > arch.experts.num_experts:
        raise CheckpointError(
            f"{where}: {arch.experts.per_token} experts per token, but only {arch.experts.num_experts} experts"
        )
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


def _refuse_quantisation(config: _Config, family: Family) -> None:
    """Packed weights are refused, but for the form that gpt-oss is published in."""
    stored = config.keys.get("quantization_config")
    if family == "gpt_oss" and isinstance(stored, dict) and stored.get("quant_method") == "mxfp4":
        return
    config.refuse("quantization_config", ({},), "quantised safetensors are not loaded; take the plain model or a GGUF")


def _experts(config: _Config, family: Family, num_layers: int) -> Experts | None:
    """The mixture of a family that has one, with that family's router."""
    match family:
        case "qwen3_moe":
            return Experts(
                num_experts=config.size("num_experts", config.size("num_local_experts", 128)),
                per_token=config.size("num_experts_per_tok", 8),
                intermediate_size=config.size("moe_intermediate_size", 768),
                dense_layers=_dense_layers(config, num_layers),
                normalised=config.flag("norm_topk_prob"),
            )
        case "mixtral":
            return Experts(
                num_experts=config.size("num_local_experts", 8),
                per_token=config.size("num_experts_per_tok", 2),
                intermediate_size=config.size("intermediate_size", 14_336),
            )
        case "gpt_oss":
            clamped = ClampedSwiglu(
                alpha=config.number("swiglu_alpha", 1.702), limit=config.number("swiglu_limit", 7.0)
            )
            return Experts(
                num_experts=config.size("num_local_experts", 128),
                per_token=config.size("num_experts_per_tok", 4),
                intermediate_size=config.size("intermediate_size", 2880),
                scores="chosen",
                router_bias=True,
                bias=True,
                clamped=clamped,
            )
        case _:
            return None


def _dense_layers(config: _Config, num_layers: int) -> tuple[int, ...]:
    """Layers of a Qwen3 mixture that have one plain feed-forward."""
    listed = config.keys.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise CheckpointError(f"{config.where}: mlp_only_layers is {listed!r}, wanted a list of layers")
    step = config.size("decoder_sparse_step", 1)
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


def _default_kv_heads(config: _Config, family: Family, heads: int) -> int:
    """A missing key means the family's default; an explicit null means one key/value head per head."""
    default = DEFAULT_KV_HEADS[family]
    return heads if default is None or "num_key_value_heads" in config.keys else default


def _sliding(config: _Config, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """Sliding window in tokens and which layers have it."""
    if family == "llama" or (family.startswith("qwen") and not config.flag("use_sliding_window")):
        return None, None
    default = {"mixtral": None, "gpt_oss": 128}.get(family, DEFAULT_WINDOW)
    if config.keys.get("sliding_window", default) is None:
        return None, None
    window = config.size("sliding_window", default)
    if family in ("mixtral", "qwen3_moe"):
        return window, None
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
    elif family == "gpt_oss":
        slides = tuple(layer % 2 == 0 for layer in range(num_layers))
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
    missing = GPT_OSS_ROPE if family == "gpt_oss" else {}
    scaling = config.keys.get("rope_scaling") or config.keys.get("rope_parameters") or missing
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
        theta=rope.number("rope_theta", DEFAULT_THETA.get(family, 10_000.0)),
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
