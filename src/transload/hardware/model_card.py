"""What a cost model must know of a decoder-only transformer, from a card of the catalog or any `config.json`.

Owns dimensions and provenance. What follows from them (parameters, bytes, FLOPs) is in `model_facts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec

from transload.hardware.precision import Precision
from transload.hardware.quantity import Confidence, Kind, Quantity, Slug, Text
from transload.hardware.slots import Slots


class Gqa(msgspec.Struct, frozen=True, kw_only=True, tag="gqa"):
    """Grouped-query attention; multi-head and multi-query are its ends. A key and a value per KV head are cached."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_rank: int | None = None
    """Queries go through a low-rank bottleneck of this width (multi-matrix factorisation, Step-3)."""


class Mla(msgspec.Struct, frozen=True, kw_only=True, tag="mla"):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). One latent per token is cached."""

    num_heads: int
    query_rank: int | None
    kv_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int


Attention: TypeAlias = Gqa | Mla


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """The mixture in those layers that have one."""

    num_experts: int
    per_token: int
    expert_size: int
    """Inner width of one expert."""
    num_shared: int = 0
    shared_size: int = 0
    """Inner width of all shared experts together; every token goes through it."""
    shared_gate: bool = False


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """Small weights that are there or not, so that parameters can be counted to the unit."""

    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    norm_bias: bool = False
    norms_per_layer: int = 2
    router_bias: bool = False
    attention_sinks: bool = False
    learned_positions: int = 0


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where the dimensions come from. They are one published file, so they share one source and class."""

    source: tuple[str, ...]
    kind: Kind = msgspec.field(name="class")
    confidence: Confidence = "high"


class Doubt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key of the config that is less certain than the rest."""

    field: Text
    source: Text
    kind: Kind = msgspec.field(name="class")
    confidence: Confidence = "low"
    note: Text


class Published(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameter counts as their makers state them, to check our own count against."""

    total: Quantity | None = None
    active: Quantity | None = None

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        return {"total": "parameters", "active": "parameters"}

    def quantities_by_name(self) -> Iterator[tuple[str, Quantity]]:
        """Those that are known."""
        for name, quantity in (("published total", self.total), ("published active", self.active)):
            if quantity is not None:
                yield name, quantity


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A card as it stands in a file: a published `config.json`, and where it is from."""

    id: Slug
    name: Text
    aliases: tuple[Slug, ...] = ()
    source: Text | tuple[Text, ...]
    kind: Kind = msgspec.field(name="class")
    confidence: Confidence = "high"
    config: dict[str, Any]
    doubts: tuple[Doubt, ...] = ()
    published: Published = Published()
    notes: tuple[Text, ...] = ()


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model, by the numbers. Sizes count elements."""

    id: str
    name: str
    family: str
    """`model_type` of the config."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    ffn_size: int | None
    """Inner width of the dense feed-forward layers; None if all layers have experts."""
    gated_ffn: bool = True
    """Three matrices (gate, up, down) instead of two."""
    attention: Attention
    experts: Experts | None = None
    expert_layers: tuple[bool, ...] = ()
    """Which layers have experts; empty: none."""
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    """Which layers see no further back than the window; empty: none."""
    tied_embeddings: bool = False
    max_context: int | None = None
    extras: Extras = Extras()
    precision: Precision = Precision()
    """As stored."""
    provenance: Provenance
    aliases: tuple[str, ...] = ()
    published: Published = Published()
    doubts: tuple[Doubt, ...] = ()
    remarks: tuple[str, ...] = ()
    """What the reader of the config took for granted or left out; belongs beside every result."""

    @property
    def num_expert_layers(self) -> int:
        return sum(self.expert_layers)

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers - self.num_expert_layers

    @property
    def num_sliding_layers(self) -> int:
        return sum(self.sliding_layers)
