"""The matrices of a model as one chip of a split holds them: FLOPs and bytes, before any efficiency.

Counts exactly. Owns which matrix is split how, and how often it occurs in a step; never turns work into seconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from transload.hardware.model_card import Gqa, Mla, ModelCard
from transload.hardware.model_facts import attention_flops_per_pair, kv_elements_per_token_layer
from transload.hardware.parallel import Parallel
from transload.hardware.precision import DTYPE_BYTES, DType, Precision

Rows = Literal["rank", "stage", "sequences"]
"""Whose rows a matrix is multiplied with: the tokens of one attention rank, of the whole stage, or one a sequence."""
Part = Literal["attention", "ffn", "head"]


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """A weight matrix (or several of one shape that are read together) as one chip holds it."""

    name: str
    part: Part
    rows: Rows
    num_layers: int
    """How often it occurs in a step."""
    inputs: float
    outputs: float
    dtype: DType

    @property
    def weights(self) -> float:
        return self.inputs * self.outputs

    @property
    def weight_bytes(self) -> float:
        return self.weights * DTYPE_BYTES[self.dtype]

    @property
    def flops_per_row(self) -> float:
        return 2.0 * self.weights


class ExpertMatrices(msgspec.Struct, frozen=True, kw_only=True):
    """The routed experts of one layer as one chip holds them."""

    num_layers: int
    num_experts: int
    """In the model."""
    local_experts: int
    """On this chip, whole or in part."""
    per_token: int
    hidden: int
    inner: float
    """Inner width of what this chip holds of one expert."""
    weights_each: float
    """Weights of one expert on this chip."""
    dtype: DType
    ranks: int
    """Over how many chips or groups of chips the experts are dealt out."""


class AttentionWork(msgspec.Struct, frozen=True, kw_only=True):
    """Attention of one layer on one chip, per pair of tokens and per token of context."""

    num_full_layers: int
    num_sliding_layers: int
    window: int
    prefill_flops_per_pair: float
    decode_flops_per_pair: float
    kv_bytes_per_token: float
    """Read per token of context, and written per new token, in one layer on one chip."""
    expansion_flops: float
    """MLA: un-absorbed prefill expands each cached latent once a chunk."""
    latent: bool
    heads: float


class Activations(msgspec.Struct, frozen=True, kw_only=True):
    """Elementwise traffic of a step."""

    bytes_per_token: float
    """Norms, residuals and gates of all layers, per token, on one chip."""
    hidden_bytes: int
    """A row of the residual stream."""


def dense_matrices(card: ModelCard, parallel: Parallel, precision: Precision) -> tuple[Matrix, ...]:
    """Every matrix outside the routed experts."""
    matrices = [*_attention_matrices(card, parallel, precision)]
    wide = 2 if card.gated_ffn else 1
    hidden, tensor = card.hidden_size, parallel.tensor

    def block(name: str, size: int, layers: int, dtype: DType) -> list[Matrix]:
        up = Matrix(
            name=f"{name}_up", part="ffn", rows="rank", num_layers=layers, inputs=hidden,
            outputs=wide * size / tensor, dtype=dtype,
        )  # fmt: skip
        down = Matrix(
            name=f"{name}_down", part="ffn", rows="rank", num_layers=layers, inputs=size / tensor,
            outputs=hidden, dtype=dtype,
        )  # fmt: skip
        return [up, down]

    if card.num_dense_layers and card.ffn_size:
        matrices += block("ffn", card.ffn_size, card.num_dense_layers, precision.dense_ffn)
    experts = card.experts
    if experts is not None and card.num_expert_layers:
        if experts.shared_size:
            matrices += block("shared", experts.shared_size, card.num_expert_layers, precision.experts)
        matrices.append(
            Matrix(
                name="router",
                part="ffn",
                rows="rank",
                num_layers=card.num_expert_layers,
                inputs=hidden,
                outputs=experts.num_experts,
                dtype=precision.embeddings,
            )
        )
    matrices.append(
        Matrix(
            name="head",
            part="head",
            rows="sequences",
            num_layers=1,
            inputs=hidden,
            outputs=card.vocab_size / tensor,
            dtype=precision.embeddings,
        )
    )
    return tuple(matrices)


def _attention_matrices(card: ModelCard, parallel: Parallel, precision: Precision) -> list[Matrix]:
    hidden, ways, dtype = card.hidden_size, parallel.tensor, precision.attention

    def matrix(name: str, inputs: float, outputs: float) -> Matrix:
        return Matrix(
            name=name, part="attention", rows="rank", num_layers=card.num_layers, inputs=inputs, outputs=outputs,
            dtype=dtype,
        )  # fmt: skip

    match card.attention:
        case Gqa(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, query_rank=rank):
            kv = 2 * max(1.0, kv_heads / ways) * dim
            output = matrix("output", heads * dim / ways, hidden)
            if rank is None:
                return [matrix("qkv", hidden, heads * dim / ways + kv), output]
            return [matrix("q_down_kv", hidden, rank + kv), matrix("q_up", rank, heads * dim / ways), output]
        case Mla(num_heads=heads, query_rank=rank, kv_rank=kv_rank, rope_head_dim=rope) as mla:
            query = heads * (mla.nope_head_dim + rope) / ways
            latent = kv_rank + rope
            up = matrix("kv_up", kv_rank, heads * (mla.nope_head_dim + mla.value_head_dim) / ways)
            output = matrix("output", heads * mla.value_head_dim / ways, hidden)
            if rank is None:
                return [matrix("q_kv_down", hidden, query + latent), up, output]
            return [matrix("q_kv_down", hidden, rank + latent), matrix("q_up", rank, query), up, output]


def expert_matrices(card: ModelCard, parallel: Parallel, precision: Precision) -> ExpertMatrices | None:
    """The routed experts of one chip; None for a dense model."""
    experts = card.experts
    if experts is None or not card.num_expert_layers:
        return None
    wide = 3 if card.gated_ffn else 2
    inner = experts.expert_size / parallel.expert_tensor
    return ExpertMatrices(
        num_layers=card.num_expert_layers,
        num_experts=experts.num_experts,
        local_experts=experts.num_experts // parallel.expert,
        per_token=experts.per_token,
        hidden=card.hidden_size,
        inner=inner,
        weights_each=wide * card.hidden_size * inner,
        dtype=precision.experts,
        ranks=parallel.expert,
    )


def attention_work(card: ModelCard, parallel: Parallel, precision: Precision) -> AttentionWork:
    """Attention proper: scores, softmax and the weighted sum, without the projections."""
    match card.attention:
        case Gqa(num_kv_heads=kv_heads, head_dim=dim):
            cells = 2 * max(1.0, kv_heads / parallel.tensor) * dim
            expansion = 0.0
        case Mla() as mla:
            cells = float(kv_elements_per_token_layer(card))
            expansion = 2.0 * mla.kv_rank * mla.num_heads * (mla.nope_head_dim + mla.value_head_dim) / parallel.tensor
    return AttentionWork(
        num_full_layers=card.num_layers - card.num_sliding_layers,
        num_sliding_layers=card.num_sliding_layers,
        window=card.sliding_window or 0,
        prefill_flops_per_pair=attention_flops_per_pair(card) / parallel.tensor,
        decode_flops_per_pair=attention_flops_per_pair(card, absorbed=True) / parallel.tensor,
        kv_bytes_per_token=cells * DTYPE_BYTES[precision.kv],
        expansion_flops=expansion,
        latent=isinstance(card.attention, Mla),
        heads=card.attention.num_heads / parallel.tensor,
    )


def activations(card: ModelCard, parallel: Parallel) -> Activations:
    """Elementwise work at two bytes an element: per layer two residual adds with norm (two rows read, two written)
    and, in the feed-forward, the gate (its inputs read, its output written)."""
    hidden_bytes = 2 * card.hidden_size
    wide = 3 if card.gated_ffn else 2
    gate = card.num_dense_layers * (card.ffn_size or 0) / parallel.tensor
    if card.experts is not None:
        gate += card.num_expert_layers * card.experts.shared_size / parallel.tensor
    return Activations(
        bytes_per_token=card.num_layers * 2 * 4 * hidden_bytes + 2 * wide * gate,
        hidden_bytes=hidden_bytes,
    )


def causal_pairs(start: int, num_tokens: int, window: int | None) -> int:
    """Pairs of (query, key) of a chunk: token i of it sees `start + i` tokens and itself, or its window."""
    first, last = start + 1, start + num_tokens
    if window is None or last <= window:
        return (first + last) * num_tokens // 2
    growing = max(0, min(window, last) - first + 1)
    return (2 * first + growing - 1) * growing // 2 + (num_tokens - growing) * window
