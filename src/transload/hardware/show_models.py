"""Models in the terminal: a table of all, or one with its dimensions and what follows from them at a working point."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from transload.hardware.catalog import describe_source
from transload.hardware.model_card import Gqa, Mla, ModelCard
from transload.hardware.model_facts import (
    ParameterCount,
    count_parameters,
    decode_flops,
    decode_intensity,
    decode_read_bytes,
    experts_touched,
    kv_bytes,
    kv_bytes_per_token,
    kv_elements_per_token_layer,
    prefill_flops,
    prefill_intensity,
    weight_bytes,
)
from transload.hardware.precision import Precision
from transload.hardware.quantity import format_amount
from transload.hardware.show import quantities_table, show_sources
from transload.units import format_bytes


class WorkingPoint(msgspec.Struct, frozen=True, kw_only=True):
    """At which batch and context the derived numbers are taken."""

    batch: int = 1
    context_tokens: int = 4096
    skew: float = 0.0


class Derived(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from a model's dimensions at one working point. FLOPs and bytes exact, no efficiency in them."""

    at: WorkingPoint
    precision: Precision
    weight_bytes: int
    kv_elements_per_token_layer: int
    kv_bytes_per_token: int
    kv_bytes_per_request: int
    prefill_flops: int
    """A prompt as long as the context."""
    prefill_flops_per_byte: float
    decode_flops_per_token: int
    decode_read_bytes: float
    decode_flops_per_byte: float
    experts_touched: float | None


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """A model as `transload models NAME --json` prints it."""

    card: ModelCard
    parameters: ParameterCount
    derived: Derived


def explain_model(card: ModelCard, point: WorkingPoint) -> Explained:
    """Everything that follows from a card. Raises `DeploymentError` for a working point that makes no sense."""
    context = point.context_tokens
    touched = None
    if card.experts is not None:
        touched = experts_touched(card.experts.num_experts, card.experts.per_token, point.batch, point.skew)
    derived = Derived(
        at=point,
        precision=card.precision,
        weight_bytes=weight_bytes(card),
        kv_elements_per_token_layer=kv_elements_per_token_layer(card),
        kv_bytes_per_token=kv_bytes_per_token(card),
        kv_bytes_per_request=kv_bytes(card, context),
        prefill_flops=prefill_flops(card, context),
        prefill_flops_per_byte=prefill_intensity(card, context, skew=point.skew),
        decode_flops_per_token=decode_flops(card, context),
        decode_read_bytes=decode_read_bytes(card, point.batch, context, skew=point.skew),
        decode_flops_per_byte=decode_intensity(card, point.batch, context, skew=point.skew),
        experts_touched=touched,
    )
    return Explained(card=card, parameters=count_parameters(card), derived=derived)


def models_table(cards: list[ModelCard]) -> Table:
    """One line a model."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("model", "layers", "hidden", "attention", "experts", "parameters", "active", "weights", "KV a token"):
        table.add_column(name, justify="left" if name in ("model", "attention", "experts") else "right")
    for card in cards:
        count = count_parameters(card)
        table.add_row(
            escape(card.id),
            str(card.num_layers),
            str(card.hidden_size),
            attention_words(card),
            experts_words(card),
            format_amount(count.total, "parameters"),
            format_amount(count.active, "parameters"),
            format_bytes(weight_bytes(card)),
            format_bytes(kv_bytes_per_token(card)),
        )
    return table


def attention_words(card: ModelCard) -> str:
    """`GQA 64/8 x 128, window 128 on 18 layers`."""
    match card.attention:
        case Gqa(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, query_rank=rank):
            kind = "MHA" if heads == kv_heads else "MQA" if kv_heads == 1 else "GQA"
            words = f"{kind} {heads}/{kv_heads} x {dim}" + (f", query rank {rank}" if rank else "")
        case Mla(num_heads=heads, kv_rank=rank, rope_head_dim=rope):
            words = f"MLA {heads}, latent {rank}+{rope}"
    if card.num_sliding_layers:
        words += f", window {card.sliding_window} on {card.num_sliding_layers} layers"
    return words


def experts_words(card: ModelCard) -> str:
    """`8 of 256 + 1 shared`."""
    if card.experts is None:
        return "-"
    shared = f" + {card.experts.num_shared} shared" if card.experts.num_shared else ""
    return f"{card.experts.per_token} of {card.experts.num_experts}{shared}"


def show_model(explained: Explained, console: Console) -> None:
    """One model: dimensions, parameters by part, bytes and FLOPs at the working point, provenance, remarks."""
    card, count, derived = explained.card, explained.parameters, explained.derived
    console.print(Text(f"{card.id}: {card.name}", style="bold"), soft_wrap=True)
    provenance = card.provenance
    where = "; ".join(describe_source(key) for key in provenance.source)
    head = [
        ("from", f"{where} ({provenance.kind}, confidence {provenance.confidence})"),
        ("shape", f"{card.num_layers} layers of {card.hidden_size}, vocabulary {card.vocab_size}"),
        ("attention", attention_words(card)),
        ("ffn", _ffn_words(card)),
        ("context", "not stated" if card.max_context is None else f"{card.max_context:,} tokens"),
        ("stored as", _precision_words(card.precision)),
    ]
    if card.aliases:
        head.append(("also", ", ".join(card.aliases)))
    for label, words in head:
        console.print(Text.assemble((f"{label:<10}", "bold"), words), soft_wrap=True)
    console.print(_parameters_table(count))
    published = list(card.published.quantities_by_name())
    if published:
        console.print(quantities_table(published))
    _show_derived(derived, console)
    for doubt in card.doubts:
        words = f"doubtful: {doubt.field} ({doubt.kind}, {doubt.confidence}): {doubt.note}"
        console.print(Text(words, style="yellow"), soft_wrap=True)
    for remark in card.remarks:
        console.print(Text(f"note: {remark}"), soft_wrap=True)
    show_sources((quantity for _, quantity in published), console)


def _ffn_words(card: ModelCard) -> str:
    parts = []
    if card.ffn_size is not None and card.num_dense_layers:
        parts.append(f"{card.num_dense_layers} dense layers of {card.ffn_size}")
    if card.experts is not None:
        parts.append(
            f"{card.num_expert_layers} layers with {experts_words(card)} experts of {card.experts.expert_size}"
        )
    return ", ".join(parts) + ("" if card.gated_ffn else "; two matrices, no gate")


def _precision_words(precision: Precision) -> str:
    return ", ".join(f"{name} {getattr(precision, name)}" for name in precision.__struct_fields__)


def _parameters_table(count: ParameterCount) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("parameters")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    for name in count.__struct_fields__:
        value = getattr(count, name)
        if value:
            table.add_row(name.replace("_", " "), f"{value:,}", f"{value / count.total:.1%}")
    return table


def _show_derived(derived: Derived, console: Console) -> None:
    at = derived.at
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("weights", format_bytes(derived.weight_bytes)),
        ("KV of a token", f"{format_bytes(derived.kv_bytes_per_token)} ({derived.kv_bytes_per_token:,} B)"),
        (f"KV of a request of {at.context_tokens:,} tokens", format_bytes(derived.kv_bytes_per_request)),
        (f"prefill of {at.context_tokens:,} tokens", f"{derived.prefill_flops:.4g} FLOP"),
        ("  FLOP per byte", f"{derived.prefill_flops_per_byte:,.4g}"),
        (f"decoding a token at {at.context_tokens:,}", f"{derived.decode_flops_per_token:.4g} FLOP"),
        (f"  reads, at batch {at.batch:,}", format_bytes(derived.decode_read_bytes)),
        ("  FLOP per byte", f"{derived.decode_flops_per_byte:,.4g}"),
    ]
    if derived.experts_touched is not None:
        rows.append((f"  experts touched a layer, skew {at.skew:g}", f"{derived.experts_touched:.1f}"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
