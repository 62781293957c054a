"""The Llama family as a generator: attention on this side, every feed-forward a call that somebody answers.

Owns the layers' arithmetic and their order. Never decides where a feed-forward is computed: `AttentionSide.run` yields
an `FfnCall` per layer and is sent FFN(hidden) back, so one code serves a worker that holds everything and one that
sends its feed-forwards away. The residual stays here, in float32.

Shapes: T rows, E hidden size, H query heads, K key/value heads, D head dimension, I intermediate size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch.nn import functional

from transload.arch import ModelArch
from transload.model.batch import Batch
from transload.model.linear import Linear


class FfnCall:
    """A layer's feed-forward, to be computed for the normed rows `hidden` [T, E]."""

    __slots__ = ("hidden", "layer", "micro_batch", "step")

    def __init__(self, step: int, layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
        self.step = step
        self.layer = layer
        self.micro_batch = micro_batch
        self.hidden = hidden


LayerCalls = Generator[FfnCall, torch.Tensor, torch.Tensor]
"""Yields one call a layer; is sent its result [T, E]; returns the residual [T, E] after the last layer."""


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once to the weight's dtype."""

    __slots__ = ("_dtype", "_eps", "_inverse_size", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._dtype = weight.dtype
        self._weight = weight.float()
        self._eps = torch.tensor(eps, device=weight.device)
        self._inverse_size = 1.0 / weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        squares = torch.linalg.vecdot(x, x).unsqueeze(-1)
        scale = torch.add(self._eps, squares, alpha=self._inverse_size).rsqrt_()
        return (x * scale).mul_(self._weight).to(self._dtype)


class AttentionLayer:
    """One layer up to its feed-forward: norm, attention, residual, norm."""

    def __init__(
        self,
        arch: ModelArch,
        *,
        input_norm: RmsNorm,
        qkv: Linear,
        query_norm: RmsNorm | None,
        key_norm: RmsNorm | None,
        output: Linear,
        ffn_norm: RmsNorm,
    ) -> None:
        """`qkv` [(H + 2 K) * D, E] stacks the three projections; the head norms are Qwen3's."""
        self._num_query_heads = arch.num_heads
        self._num_rotated = arch.num_heads + arch.num_kv_heads
        self._head_dim = arch.head_dim
        self._input_norm = input_norm
        self._qkv = qkv
        self._query_norm = query_norm
        self._key_norm = key_norm
        self._output = output
        self._ffn_norm = ffn_norm

    def __call__(self, layer: int, residual_TE: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Write this step's keys and values, add attention to the residual in place, return the normed rows [T, E]."""
        num_q, num_rotated = self._num_query_heads, self._num_rotated
        qkv_TXD = self._qkv(self._input_norm(residual_TE)).view(residual_TE.shape[0], -1, self._head_dim)
        if self._query_norm is not None and self._key_norm is not None:
            qkv_TXD[:, :num_q] = self._query_norm(qkv_TXD[:, :num_q])
            qkv_TXD[:, num_q:num_rotated] = self._key_norm(qkv_TXD[:, num_q:num_rotated])
        qk_TXD = batch.rotation(qkv_TXD[:, :num_rotated])
        rows = batch.cache.rows[layer]
        rows.index_copy_(0, batch.key_rows, qk_TXD[:, num_q:].reshape(-1, self._head_dim))
        rows.index_copy_(0, batch.value_rows, qkv_TXD[:, num_rotated:].reshape(-1, self._head_dim))
        mixed_TE = batch.plans[layer].attend(qk_TXD[:, :num_q], batch.cache.pieces[layer])
        residual_TE += self._output(mixed_TE)
        return self._ffn_norm(residual_TE)


class FeedForward:
    """down(silu(gate(x)) * up(x))."""

    __slots__ = ("_deterministic", "_down", "_gate_up", "_intermediate")

    def __init__(self, gate_up: Linear, down: Linear, intermediate: int, *, deterministic: bool) -> None:
        """`gate_up` [2 I, E] stacks both projections."""
        self._gate_up = gate_up
        self._down = down
        self._intermediate = intermediate
        self._deterministic = deterministic

    def __call__(self, hidden_TE: torch.Tensor) -> torch.Tensor:
        gate_up_TX = self._gate_up(hidden_TE)
        gate_TI, up_TI = gate_up_TX[:, : self._intermediate], gate_up_TX[:, self._intermediate :]
        silu = _steady_silu if self._deterministic else functional.silu
        return self._down(silu(gate_TI).mul_(up_TI))


def _steady_silu(x: torch.Tensor) -> torch.Tensor:
    """silu whose bits do not depend on where an element lies.

    torch's own takes other code for the last elements of a run, which differ in the last bit in float32 (4 % of them);
    its exp does not.
    """
    gate = x.float()
    return gate.div_(gate.neg().exp_().add_(1.0)).to(x.dtype)


class AttentionSide:
    """Everything of the model but the feed-forwards."""

    def __init__(
        self, embedding: torch.Tensor, layers: Sequence[AttentionLayer], final_norm: RmsNorm, head: Linear
    ) -> None:
        """`embedding` [V, E]; `head` [V, E] is packed separately even if it is the same weight."""
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._head = head

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def run(self, batch: Batch) -> LayerCalls:
        """One micro-batch through all layers. When a call is yielded, its layer's keys and values are in the cache."""
        residual_TE = functional.embedding(batch.token_ids, self._embedding).float()
        for number, layer in enumerate(self._layers):
            hidden_TE = layer(number, residual_TE, batch)
            ffn_TE = yield FfnCall(batch.step, number, batch.micro_batch, hidden_TE)
            residual_TE += ffn_TE
        return residual_TE

    def logits(self, residual_TE: torch.Tensor) -> torch.Tensor:
        """[R, V] in the model's dtype, of rows [R, E] that `run` returned."""
        return self._head(self._final_norm(residual_TE))


class LlamaModel:
    """Both halves in one place."""

    def __init__(
        self,
        arch: ModelArch,
        dtype: torch.dtype,
        attention: AttentionSide,
        feed_forwards: Sequence[FeedForward],
        *,
        deterministic: bool,
        device: torch.device,
    ) -> None:
        self.arch = arch
        self.dtype = dtype
        self.attention = attention
        self.feed_forwards = feed_forwards
        self.deterministic = deterministic
        self.device = device
