"""The Llama family as a generator: attention on this side, every feed-forward a call that somebody answers.

Owns the layers' arithmetic and their order. Never decides where a feed-forward is computed: `AttentionSide.run` yields
an `FfnCall` per layer and is sent FFN(hidden) back, so one code serves a worker that holds everything and one that
sends its feed-forwards away. The residual stays here, in float32.

A mixture's router is on this side too: its call says which experts each row goes through.

Shapes: T rows, E hidden size, H query heads, K key/value heads, D head dimension, I intermediate size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from transload.arch import ClampedSwiglu, ModelArch
from transload.model.batch import Batch
from transload.model.experts import Router, Routing
from transload.model.linear import Linear


class FfnCall:
    """A layer's feed-forward, to be computed for the normed rows `hidden` [T, E].

    `routing` says which experts each row goes through, in a layer that is a mixture.
    """

    __slots__ = ("hidden", "layer", "micro_batch", "routing", "step")

    def __init__(
        self, step: int, layer: int, micro_batch: int, hidden: torch.Tensor, routing: Routing | None = None
    ) -> None:
        self.step = step
        self.layer = layer
        self.micro_batch = micro_batch
        self.hidden = hidden
        self.routing = routing


class FeedForwardLayer(Protocol):
    """Answers a layer's calls: rows [T, E] and, in a mixture, their routing, to rows [T, E]."""

    def __call__(self, hidden_TE: torch.Tensor, routing: Routing | None = None, /) -> torch.Tensor: ...


LayerCalls = Generator[FfnCall, torch.Tensor, torch.Tensor]
"""Yields a call a layer; is sent its result, rows as in `hidden`; returns the residual [R, E] after the last layer, of
the rows after which a token is drawn, in the order of the chunks."""


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once to the weight's dtype."""

    __slots__ = ("_dtype", "_eps", "_inverse_size", "weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._dtype = weight.dtype
        self.weight = weight.float()
        self._eps = torch.tensor(eps, device=weight.device)
        self._inverse_size = 1.0 / weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=self._inverse_size).rsqrt_()
        return (x * scale).mul_(self.weight).to(self._dtype)


class AttentionParts(NamedTuple):
    """What an attention layer is made of, for kernels that compute it in one go."""

    input_norm: RmsNorm
    qkv: Linear
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    output: Linear
    sinks: torch.Tensor | None
    ffn_norm: RmsNorm


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
        sinks: torch.Tensor | None,
        ffn_norm: RmsNorm,
        router: Router | None,
    ) -> None:
        """`qkv` [(H + 2 K) * D, E] stacks the three projections; the head norms are Qwen3's, `sinks` [H] gpt-oss's."""
        self._num_query_heads = arch.num_heads
        self._num_rotated = arch.num_heads + arch.num_kv_heads
        self._head_dim = arch.head_dim
        self._input_norm = input_norm
        self._qkv = qkv
        self._query_norm = query_norm
        self._key_norm = key_norm
        self._output = output
        self._sinks = sinks
        self._ffn_norm = ffn_norm
        self._router = router

    @property
    def parts(self) -> AttentionParts:
        return AttentionParts(
            self._input_norm, self._qkv, self._query_norm, self._key_norm, self._output, self._sinks, self._ffn_norm
        )

    def project(self, layer: int, residual_TE: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Write the rows' keys and values into the cache; return their rotated queries [T, H, D]."""
        num_q, num_rotated = self._num_query_heads, self._num_rotated
        qkv_TXD = self._qkv(self._input_norm(residual_TE)).view(len(residual_TE), -1, self._head_dim)
        qk_TXD, v_TKD = qkv_TXD.tensor_split((num_rotated,), 1)
        if self._query_norm is not None and self._key_norm is not None:
            qk_TXD[:, :num_q] = self._query_norm(qk_TXD[:, :num_q])
            qk_TXD[:, num_q:] = self._key_norm(qk_TXD[:, num_q:])
        q_THD, k_TKD = batch.rotation(qk_TXD).tensor_split((num_q,), 1)
        rows = batch.cache.rows[layer]
        rows.index_copy_(0, batch.key_rows, k_TKD.reshape(-1, self._head_dim))
        rows.index_copy_(0, batch.value_rows, v_TKD.reshape(-1, self._head_dim))
        return q_THD

    def attend(self, layer: int, q_THD: torch.Tensor, residual_TE: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Add the attention output to the residual, in place; return the normed rows [T, E] for the feed-forward."""
        residual_TE += self._output(batch.plans[layer].attend(q_THD, batch.cache.pieces[layer], self._sinks))
        return self._ffn_norm(residual_TE)

    def route(self, hidden_TE: torch.Tensor) -> Routing | None:
        """Which experts the normed rows go through; None if the layer's feed-forward is a plain one."""
        return self._router(hidden_TE) if self._router is not None else None

    @property
    def num_chosen(self) -> list[int]:
        """How often each expert of its mixture was chosen so far, empty if none was; one number for a plain layer."""
        if self._router is None:
            return [0]
        chosen = self._router.num_chosen
        return chosen.tolist() if chosen is not None else []


Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Gate and up [T, I] to what goes down [T, I]."""


class FeedForward:
    """down(activation(gate(x), up(x)))."""

    __slots__ = ("_activation", "_down", "_gate_up")

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        """`gate_up` [2 I, E] stacks both projections."""
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    @property
    def linears(self) -> tuple[Linear, Linear]:
        """Gate and up stacked; down."""
        return self._gate_up, self._down

    @property
    def is_native(self) -> bool:
        """Whether our own kernels can compute it in one go: packed, and its activation is silu(gate) * up."""
        gate_up, down = self._gate_up.packed, self._down.packed
        return self._activation is swiglu and down is not None and gate_up is not None and gate_up.struct.split > 0

    def __call__(self, hidden_TE: torch.Tensor, _routing: Routing | None = None) -> torch.Tensor:
        gate_TI, up_TI = self._gate_up(hidden_TE).chunk(2, -1)
        return self._down(self._activation(gate_TI, up_TI))


def swiglu(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return functional.silu(gate_TI).mul_(up_TI)


def steady_swiglu(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, with bits that do not depend on where an element lies.

    torch's own silu takes other code for the last elements of a run, which differ in the last bit in float32 (4 % of
    them); its exp does not.
    """
    gate = gate_TI.float()
    return gate.div_(gate.neg().exp_().add_(1.0)).to(gate_TI.dtype).mul_(up_TI)


def clamped_swiglu(clamped: ClampedSwiglu) -> Activation:
    """gpt-oss's activation, see `ClampedSwiglu`. In float32, rounded once; steady in the sense above."""

    def activation(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        gate = gate_TI.float().clamp(max=clamped.limit)
        up = up_TI.float().clamp(-clamped.limit, clamped.limit)
        sigmoid_divisor = (gate * -clamped.alpha).exp_().add_(1.0)
        return up.add_(1.0).mul_(gate.div_(sigmoid_divisor)).to(gate_TI.dtype)

    return activation


class AttentionSide:
    """Everything of the model but the feed-forwards."""

    def __init__(
        self, embedding: torch.Tensor | None, layers: Sequence[AttentionLayer], final_norm: RmsNorm, head: Linear
    ) -> None:
        """`embedding` [V, E]; None: its rows are those of the head [V, E], which our own kernels can unpack."""
        assert embedding is not None or head.packed is not None, "something holds the embedding"
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def run(self, batch: Batch) -> LayerCalls:
        """One micro-batch through all layers. When a call is yielded, its layer's keys and values are in the cache.

        The last layer's call has only the rows after which a token is drawn, and is left out if there are none.
        """
        residual_TE = self._embedded(batch.token_ids)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            q_THD = layer.project(number, residual_TE, batch)
            if number == last:
                if len(batch.kept) == 0:
                    return residual_TE[:0]
                if len(batch.kept) < len(residual_TE):
                    q_THD, residual_TE = q_THD[batch.kept], residual_TE[batch.kept]
            hidden_TE = layer.attend(number, q_THD, residual_TE, batch)
            ffn_TE = yield FfnCall(batch.step, number, batch.micro_batch, hidden_TE, layer.route(hidden_TE))
            residual_TE += ffn_TE
        return residual_TE[batch.drawn]

    def _embedded(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """float32 [T, E]."""
        if self.embedding is not None:
            return functional.embedding(token_ids_T, self.embedding).float()
        assert self.head.packed is not None
        return self.head.packed.rows(token_ids_T)

    def logits(self, residual_TE: torch.Tensor) -> torch.Tensor:
        """[R, V] in the model's dtype, of rows [R, E] that `run` returned."""
        return self.head(self.final_norm(residual_TE))


class LlamaModel:
    """Both halves in one place."""

    def __init__(
        self,
        arch: ModelArch,
        dtype: torch.dtype,
        attention: AttentionSide,
        feed_forwards: Sequence[FeedForwardLayer],
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
