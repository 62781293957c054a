"""What each chip holds when a model is split over several: tensor, pipeline, expert parallelism, attention by data.

Counts shares, schedules nothing. A stage of the pipeline is `tensor * data_attention` chips: attention, dense
feed-forward, embeddings and head are split `tensor` ways and copied for each data rank; experts are split over the
whole stage, `expert` ways by expert and the rest within each.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

from transload.errors import DeploymentError
from transload.hardware.model_card import Gqa, Mla, ModelCard
from transload.hardware.model_facts import count_parameters, kv_elements_per_token_layer
from transload.hardware.precision import DTYPE_BYTES, Precision

Degree = Annotated[int, Meta(ge=1, le=65_536)]


class Parallel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one worker's model is split. The product of stages and chips a stage is the worker's chips."""

    tensor: Degree = 1
    """Chips that share every matrix and the attention heads."""
    pipeline: Degree = 1
    """Stages of layers, one after the other."""
    data_attention: Degree = 1
    """Attention ranks with requests and KV of their own, so that nobody caches another's."""
    expert: Degree = 1
    """Ways in which the experts are dealt out over a stage's chips; within each way the chips share them."""

    @property
    def chips_per_stage(self) -> int:
        return self.tensor * self.data_attention

    @property
    def num_chips(self) -> int:
        return self.pipeline * self.chips_per_stage

    @property
    def expert_tensor(self) -> int:
        """How many chips share one expert."""
        return self.chips_per_stage // self.expert


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What the fullest chip holds."""

    weight_bytes: int
    kv_bytes_per_token: int
    """Of a request that this chip's attention rank has; `1 / data_attention` of all requests are."""
    num_layers: int
    kv_copies: int
    """Chips of a stage that hold the same piece of one request's cache; 1: nothing is held twice."""


def check_split(card: ModelCard, parallel: Parallel) -> None:
    """Raise `DeploymentError` if the model cannot be split this way, naming what does not divide."""
    for name in ("tensor", "pipeline", "data_attention", "expert"):
        if getattr(parallel, name) < 1:
            raise DeploymentError(f"{card.id}: {name} is {getattr(parallel, name)}, wanted at least 1")
    if card.attention.num_heads % parallel.tensor:
        raise DeploymentError(f"{card.id}: {card.attention.num_heads} heads cannot be split {parallel.tensor} ways")
    if parallel.pipeline > card.num_layers:
        raise DeploymentError(f"{card.id}: {card.num_layers} layers cannot fill {parallel.pipeline} pipeline stages")
    if parallel.expert > 1 and card.experts is None:
        raise DeploymentError(f"{card.id}: it has no experts, so expert must be 1, not {parallel.expert}")
    if parallel.chips_per_stage % parallel.expert:
        raise DeploymentError(
            f"{card.id}: expert = {parallel.expert} must divide the {parallel.chips_per_stage} chips of a stage "
            "(tensor * data_attention)"
        )
    if card.experts is not None and card.experts.num_experts % parallel.expert:
        raise DeploymentError(
            f"{card.id}: {card.experts.num_experts} experts cannot be dealt out to {parallel.expert} evenly"
        )


def share_of_chip(card: ModelCard, parallel: Parallel, precision: Precision | None = None) -> Share:
    """Weights and KV of the fullest chip. Raises `DeploymentError` if the model cannot be split this way.

    KV heads are split over the tensor ranks until each has one, and copied beyond that; a latent (MLA) has no heads
    to split, so every tensor rank holds all of it, which is what attention by data avoids.
    """
    check_split(card, parallel)
    stored = card.precision if precision is None else precision
    match card.attention:
        case Gqa(num_kv_heads=kv_heads):
            ways = min(parallel.tensor, kv_heads)
            elements = math.ceil(kv_heads / ways) * 2 * card.attention.head_dim
        case Mla():
            ways = 1
            elements = kv_elements_per_token_layer(card)
    layers = math.ceil(card.num_layers / parallel.pipeline)
    return Share(
        weight_bytes=max(_stage_bytes(card, parallel, stored)),
        kv_bytes_per_token=math.ceil(layers * elements * DTYPE_BYTES[stored.kv]),
        num_layers=layers,
        kv_copies=math.ceil(parallel.tensor / ways),
    )


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage: in order, as even as can be, the longer stages first."""
    short, longer = divmod(num_layers, num_stages)
    starts = [stage * short + min(stage, longer) for stage in range(num_stages + 1)]
    return [range(first, last) for first, last in pairwise(starts)]


def _stage_bytes(card: ModelCard, parallel: Parallel, stored: Precision) -> list[int]:
    """Weights on one chip of each stage. The first has the input embedding, the last the head and the final norm."""
    count = count_parameters(card)
    embedding_bytes = DTYPE_BYTES[stored.embeddings]
    every = count.attention * DTYPE_BYTES[stored.attention] / parallel.tensor + count.norms * embedding_bytes
    dense = count.dense_ffn * DTYPE_BYTES[stored.dense_ffn] / parallel.tensor
    routed = count.routed_experts * DTYPE_BYTES[stored.experts] / parallel.chips_per_stage
    shared = count.shared_experts * DTYPE_BYTES[stored.experts] / parallel.tensor
    experts = routed + shared + count.router * embedding_bytes
    head = card.vocab_size * card.hidden_size
    sizes: list[int] = []
    for stage, layers in enumerate(stage_layers(card.num_layers, parallel.pipeline)):
        num_expert_layers = sum(card.expert_layers[layers.start : layers.stop])
        size = every * len(layers) / card.num_layers
        size += experts * num_expert_layers / max(1, card.num_expert_layers)
        size += dense * (len(layers) - num_expert_layers) / max(1, card.num_dense_layers)
        ends = count.input_embedding if stage == 0 else 0
        if stage == parallel.pipeline - 1:  # a tied head is the embedding, which the last of several stages lacks
            ends += count.output_head if count.output_head or stage == 0 else head
        sizes.append(math.ceil(size + ends * embedding_bytes / parallel.tensor))
    return sizes
