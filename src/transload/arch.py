"""What a model is made of, without torch: the executor builds it, the cost model and the placement count it."""

from __future__ import annotations

from typing import Literal

import msgspec

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding. Names and meaning as in a Hugging Face `config.json`'s `rope_scaling`/`rope_parameters`."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelArch(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of a decoder-only transformer of the Llama family."""

    name: str
    family: Literal["llama", "mistral", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    """Which layers slide; None: all of them if sliding_window is set."""

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token leaves in the cache, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def num_parameters(self) -> int:
        """Weights in all; tied embeddings count once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        heads = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * self.hidden_size + self.hidden_size

    def num_ffn_parameters(self) -> int:
        """Those of the weights that an FFN worker has, all layers."""
        return self.num_layers * 3 * self.hidden_size * self.intermediate_size
