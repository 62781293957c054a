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


class ClampedSwiglu(msgspec.Struct, frozen=True, kw_only=True):
    """gpt-oss's activation: (min(max(up, -limit), limit) + 1) * g * sigmoid(alpha * g) with g = min(gate, limit)."""

    alpha: float = 1.702
    limit: float = 7.0


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts: each row of a layer goes through `per_token` of `num_experts` small feed-forwards."""

    num_experts: int
    per_token: int
    intermediate_size: int
    """Inner width of one expert."""
    dense_layers: tuple[int, ...] = ()
    """Layers with one plain feed-forward instead, of the model's own inner width."""
    scores: Literal["all", "chosen"] = "all"
    """Whether the router's softmax is over all experts' logits or over the chosen ones alone."""
    normalised: bool = True
    """Whether the chosen experts' weights are made to add up to one. Over the chosen alone they do anyway."""
    router_bias: bool = False
    bias: bool = False
    """Biases in the experts."""
    clamped: ClampedSwiglu | None = None
    """None: silu(gate) * up, as in a plain feed-forward."""


class ModelArch(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of a decoder-only transformer of the Llama family."""

    name: str
    family: Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt_oss"]
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
    sinks: bool = False
    """A logit of each head that takes part in its softmax and has no value (gpt-oss)."""
    experts: Experts | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's feed-forward is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token leaves in the cache, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def num_parameters(self) -> int:
        """Weights in all; tied embeddings count once."""
        table = self.vocab_size * self.hidden_size
        return self._outside_experts() + (0 if self.tied_embeddings else table) + self._in_experts(used_alone=False)

    def num_active_parameters(self) -> int:
        """Weights that one token is multiplied with: of each mixture the chosen experts alone, and no look-up table."""
        return self._outside_experts() + self._in_experts(used_alone=True)

    def num_expert_parameters(self) -> int:
        """Weights of one expert, biases included."""
        if self.experts is None:
            return 0
        return _feed_forward_weights(self.hidden_size, self.experts.intermediate_size, biased=self.experts.bias)

    def num_ffn_parameters(self) -> int:
        """Those of the weights that FFN workers have, all layers: feed-forwards and experts, not the routers."""
        num_dense = self.num_layers - self._num_sparse_layers()
        dense = _feed_forward_weights(self.hidden_size, self.intermediate_size, biased=self.mlp_bias)
        return num_dense * dense + self._in_experts(used_alone=False)

    def ffn_elements_per_row(self) -> int:
        """Intermediate results of one row in the widest feed-forward: a mixture gathers a row once for each choice."""
        if self.experts is None:
            return 3 * self.intermediate_size
        chosen = self.experts.per_token * 4 * self.hidden_size + 3 * self.experts.intermediate_size
        return max(chosen, 3 * self.intermediate_size) if self.experts.dense_layers else chosen

    def _outside_experts(self) -> int:
        """All weights but the experts' and the second embedding's."""
        hidden, experts = self.hidden_size, self.experts
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * hidden * (queries + keys) + 2 * hidden
        attention += queries + 2 * keys if self.qkv_bias else 0
        attention += hidden if self.output_bias else 0
        attention += 2 * self.head_dim if self.qk_norm else 0
        attention += self.num_heads if self.sinks else 0
        num_sparse = self._num_sparse_layers()
        dense = _feed_forward_weights(hidden, self.intermediate_size, biased=self.mlp_bias)
        router = experts.num_experts * (hidden + experts.router_bias) if experts is not None else 0
        layers = self.num_layers * attention + (self.num_layers - num_sparse) * dense + num_sparse * router
        return self.vocab_size * hidden + layers + hidden

    def _in_experts(self, *, used_alone: bool) -> int:
        if self.experts is None:
            return 0
        num_counted = self.experts.per_token if used_alone else self.experts.num_experts
        return self._num_sparse_layers() * num_counted * self.num_expert_parameters()

    def _num_sparse_layers(self) -> int:
        return sum(self.is_sparse(layer) for layer in range(self.num_layers))


def _feed_forward_weights(hidden: int, inner: int, *, biased: bool) -> int:
    """Gate, up and down."""
    return 3 * hidden * inner + (2 * inner + hidden if biased else 0)
