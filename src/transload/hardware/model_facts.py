"""What follows from a model's dimensions: parameters, weight and KV bytes, FLOPs, experts touched, intensity.

Exact counting, no efficiency: what a chip makes of it is the cost model's business. A FLOP is one multiply or one
add, so a matrix of n weights costs 2n FLOPs a token.
"""

from __future__ import annotations

import math

import msgspec

from transload.errors import DeploymentError
from transload.hardware.model_card import Gqa, Mla, ModelCard
from transload.hardware.precision import DTYPE_BYTES, DType, Precision


class ParameterCount(msgspec.Struct, frozen=True, kw_only=True):
    """Weights by part, over all layers."""

    input_embedding: int
    """The table of tokens, and of positions where these are learned."""
    output_head: int
    """0 if it is the input embedding once more."""
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    total: int
    active: int
    """Weights that one token is multiplied with. The input embedding is a look-up of one row and does not count,
    unless it is the output head too. (The counting of the gpt-oss model card; others count the embedding.)"""


def count_parameters(card: ModelCard) -> ParameterCount:
    """Weights of a model by part, biases and norms included."""
    hidden, extras = card.hidden_size, card.extras
    attention, attention_norms = _attention_weights(card)
    norm = hidden * (2 if extras.norm_bias else 1)
    embedding = card.vocab_size * hidden
    head = 0 if card.tied_embeddings else embedding
    dense_ffn = card.num_dense_layers * _ffn_weights(card, card.ffn_size or 0)
    routed, shared, router, active_routed = _expert_weights(card)
    norms = card.num_layers * (extras.norms_per_layer * norm + attention_norms) + norm
    table = embedding + extras.learned_positions * hidden
    layers = card.num_layers * attention + dense_ffn + shared + router + norms
    return ParameterCount(
        input_embedding=table,
        output_head=head,
        attention=card.num_layers * attention,
        dense_ffn=dense_ffn,
        routed_experts=routed,
        shared_experts=shared,
        router=router,
        norms=norms,
        total=table + head + layers + routed,
        active=embedding + layers + active_routed,
    )


def _attention_weights(card: ModelCard) -> tuple[int, int]:
    """Matrices and biases of one layer's attention; and the norms inside it."""
    hidden, extras = card.hidden_size, card.extras
    match card.attention:
        case Gqa(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, query_rank=rank):
            query = hidden * heads * dim if rank is None else rank * (hidden + heads * dim)
            weights = query + 2 * hidden * kv_heads * dim + heads * dim * hidden
            weights += (heads + 2 * kv_heads) * dim if extras.qkv_bias else 0
            weights += heads if extras.attention_sinks else 0
            norms = (2 * dim if extras.qk_norm else 0) + (rank or 0)
        case Mla(num_heads=heads, query_rank=rank, kv_rank=kv_rank) as mla:
            query_dim = mla.nope_head_dim + mla.rope_head_dim
            weights = hidden * heads * query_dim if rank is None else rank * (hidden + heads * query_dim)
            weights += hidden * (kv_rank + mla.rope_head_dim)
            weights += kv_rank * heads * (mla.nope_head_dim + mla.value_head_dim)
            weights += heads * mla.value_head_dim * hidden
            norms = (rank or 0) + kv_rank
    weights += hidden if extras.output_bias else 0
    return weights, norms


def _ffn_weights(card: ModelCard, size: int) -> int:
    """One feed-forward block of inner width `size`, biases included."""
    wide = 2 if card.gated_ffn else 1
    bias = wide * size + card.hidden_size if card.extras.ffn_bias else 0
    return (wide + 1) * card.hidden_size * size + bias


def _expert_weights(card: ModelCard) -> tuple[int, int, int, int]:
    """Routed experts, shared experts, routers, and the routed ones that a single token goes through; all layers."""
    experts = card.experts
    if experts is None:
        return 0, 0, 0, 0
    one = _ffn_weights(card, experts.expert_size)
    shared = _ffn_weights(card, experts.shared_size) if experts.shared_size else 0
    shared += card.hidden_size if experts.shared_gate else 0
    router = experts.num_experts * (card.hidden_size + (1 if card.extras.router_bias else 0))
    layers = card.num_expert_layers
    return (
        layers * experts.num_experts * one,
        layers * shared,
        layers * router,
        layers * experts.per_token * one,
    )


def weight_bytes(card: ModelCard, precision: Precision | None = None) -> int:
    """Bytes of all weights: parameters by part times the bytes of the part's format (as stored if none is given)."""
    stored = card.precision if precision is None else precision
    count = count_parameters(card)
    sizes = {name: DTYPE_BYTES[getattr(stored, name)] for name in ("attention", "dense_ffn", "experts", "embeddings")}
    return math.ceil(
        count.attention * sizes["attention"]
        + count.dense_ffn * sizes["dense_ffn"]
        + (count.routed_experts + count.shared_experts) * sizes["experts"]
        + (count.input_embedding + count.output_head + count.router + count.norms) * sizes["embeddings"]
    )


def kv_elements_per_token_layer(card: ModelCard) -> int:
    """What a token leaves in the cache of one layer: a key and a value per KV head, or the latent and its rotary part.

    MLA: kv_rank + rope_head_dim, whatever the number of heads (arXiv 2405.04434, table 1: 512 + 64 = 576).
    """
    match card.attention:
        case Gqa(num_kv_heads=kv_heads, head_dim=dim):
            return 2 * kv_heads * dim
        case Mla(kv_rank=kv_rank, rope_head_dim=rope):
            return kv_rank + rope


def kv_bytes_per_token(card: ModelCard, dtype: DType | None = None) -> int:
    """Bytes that one token adds to the cache, over all layers, while every window still has room."""
    size = DTYPE_BYTES[card.precision.kv if dtype is None else dtype]
    return math.ceil(card.num_layers * kv_elements_per_token_layer(card) * size)


def kv_bytes(card: ModelCard, context_tokens: int, dtype: DType | None = None) -> int:
    """Bytes of the cache of one request with this much context. A sliding layer keeps its window and no more."""
    size = DTYPE_BYTES[card.precision.kv if dtype is None else dtype]
    sliding = card.num_sliding_layers
    kept = min(context_tokens, card.sliding_window or context_tokens)
    cells = (card.num_layers - sliding) * context_tokens + sliding * kept
    return math.ceil(cells * kv_elements_per_token_layer(card) * size)


def linear_flops_per_token(card: ModelCard) -> int:
    """2 FLOPs a weight that a token is multiplied with, without the output head and the norms."""
    count = count_parameters(card)
    head = count.output_head or card.vocab_size * card.hidden_size
    return 2 * (count.active - head - count.norms)


def head_flops(card: ModelCard) -> int:
    """FLOPs of the logits of one position. Prefill needs those of the last position only."""
    return 2 * card.vocab_size * card.hidden_size


def attention_flops_per_pair(card: ModelCard, *, absorbed: bool = False) -> int:
    """FLOPs of one query token against one context token in one layer: scores, and the weighted sum of values.

    GQA: 2 * heads * (head_dim + head_dim). MLA un-absorbed: 2 * heads * (nope + rope + value). Absorbed, as decoding
    does it: keys and values stay latent, 2 * heads * ((kv_rank + rope) + kv_rank) (arXiv 2405.04434, section 2.1.2).
    """
    match card.attention:
        case Gqa(num_heads=heads, head_dim=dim):
            return 4 * heads * dim
        case Mla(num_heads=heads, kv_rank=kv_rank, rope_head_dim=rope) as mla:
            if absorbed:
                return 2 * heads * (2 * kv_rank + rope)
            return 2 * heads * (mla.nope_head_dim + rope + mla.value_head_dim)


def prefill_flops(card: ModelCard, num_tokens: int, cached_tokens: int = 0) -> int:
    """FLOPs to prefill `num_tokens` after `cached_tokens`, with the logits of the last position.

    linear * n + pairs * per pair; causal, so token i of the chunk attends to cached + i tokens, or to its window.
    MLA expands the latents of the cached tokens once more for every chunk, to attend un-absorbed.
    """
    window = card.sliding_window
    full = _causal_pairs(num_tokens, cached_tokens, None)
    slid = _causal_pairs(num_tokens, cached_tokens, window)
    pairs = (card.num_layers - card.num_sliding_layers) * full + card.num_sliding_layers * slid
    flops = num_tokens * linear_flops_per_token(card) + pairs * attention_flops_per_pair(card) + head_flops(card)
    if isinstance(card.attention, Mla):
        mla = card.attention
        expansion = 2 * mla.kv_rank * mla.num_heads * (mla.nope_head_dim + mla.value_head_dim)
        flops += card.num_layers * cached_tokens * expansion
    return flops


def decode_flops(card: ModelCard, context_tokens: int) -> int:
    """FLOPs of one decoded token that attends to `context_tokens` (itself included), logits included."""
    seen = min(context_tokens, card.sliding_window or context_tokens)
    pairs = (card.num_layers - card.num_sliding_layers) * context_tokens + card.num_sliding_layers * seen
    return linear_flops_per_token(card) + pairs * attention_flops_per_pair(card, absorbed=True) + head_flops(card)


def _causal_pairs(num_tokens: int, cached_tokens: int, window: int | None) -> int:
    """Sum over the new tokens of how many tokens each attends to, itself included."""
    first, last = cached_tokens + 1, cached_tokens + num_tokens
    if window is None or last <= window:
        return (first + last) * num_tokens // 2
    growing = max(0, min(window, last) - first + 1)
    return (2 * first + growing - 1) * growing // 2 + (num_tokens - growing) * window


def experts_touched(num_experts: int, per_token: int, num_tokens: float, skew: float = 0.0) -> float:
    """How many experts of a layer a batch needs: E * (1 - (1 - k/E)^tokens) where all are equally likely.

    `skew` is the exponent of a power law: expert i is chosen with a chance like (i+1)^-skew, 0 being uniform, scaled
    so that k are chosen per token on average and none more than once. Tokens are taken as independent. Raises
    `DeploymentError` for numbers that make no sense.
    """
    if not 1 <= per_token <= num_experts or num_tokens < 0 or skew < 0:
        raise DeploymentError(
            f"experts touched: {per_token} of {num_experts} experts, {num_tokens} tokens, skew {skew}: wanted 1 to all "
            "experts per token and no negative numbers"
        )
    chances = _chosen(num_experts, per_token, skew)
    return math.fsum(1.0 - math.pow(1.0 - chance, num_tokens) for chance in chances)


def _chosen(num_experts: int, per_token: int, skew: float) -> list[float]:
    """Chance of each expert to be among a token's k. One that would pass 1 is certain; the rest share what is left."""
    weights = [math.pow(rank + 1.0, -skew) for rank in range(num_experts)]
    certain = 0
    rest = sum(weights)
    while certain < per_token and weights[certain] * (per_token - certain) > rest:
        rest -= weights[certain]
        certain += 1
    scale = (per_token - certain) / rest if certain < per_token else 0.0
    return [1.0] * certain + [weight * scale for weight in weights[certain:]]


def decode_read_bytes(
    card: ModelCard, batch: int, context_tokens: int, precision: Precision | None = None, skew: float = 0.0
) -> float:
    """Bytes that a decode step of `batch` requests reads: every weight once, experts only if touched, and all caches.

    Of the input embedding one row per request is read, which is left out.
    """
    stored = card.precision if precision is None else precision
    count = count_parameters(card)
    experts = DTYPE_BYTES[stored.experts]
    read = count.attention * DTYPE_BYTES[stored.attention] + count.dense_ffn * DTYPE_BYTES[stored.dense_ffn]
    read += (count.router + count.norms) * DTYPE_BYTES[stored.embeddings]
    read += card.vocab_size * card.hidden_size * DTYPE_BYTES[stored.embeddings]
    if card.experts is not None:
        share = (
            experts_touched(card.experts.num_experts, card.experts.per_token, batch, skew) / card.experts.num_experts
        )
        read += (count.routed_experts * share + count.shared_experts) * experts
    return read + batch * kv_bytes(card, context_tokens, stored.kv)


def decode_intensity(
    card: ModelCard, batch: int, context_tokens: int, precision: Precision | None = None, skew: float = 0.0
) -> float:
    """FLOPs per byte of a decode step. Below a chip's ridge point, memory bandwidth is the limit."""
    return batch * decode_flops(card, context_tokens) / decode_read_bytes(card, batch, context_tokens, precision, skew)


def prefill_intensity(card: ModelCard, num_tokens: int, precision: Precision | None = None, skew: float = 0.0) -> float:
    """FLOPs per byte of prefilling `num_tokens` at once: weights are read once, the cache is written once."""
    stored = card.precision if precision is None else precision
    read = decode_read_bytes(card, num_tokens, 0, stored, skew)
    return prefill_flops(card, num_tokens) / (read + kv_bytes(card, num_tokens, stored.kv))
