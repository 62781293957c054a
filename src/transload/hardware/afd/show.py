"""The answer of the ratio search, to read: the best ratios, the yardstick, the verdict, and what it rests on."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from transload.hardware.afd.memory import describe_split, side_weight_bytes
from transload.hardware.afd.search import Answer, Candidate, Question, Unsplit
from transload.hardware.parallel import Parallel
from transload.hardware.quantity import format_amount
from transload.units import format_bytes


def show_answer(question: Question, answer: Answer, top: int, console: Console) -> None:
    """Print it."""
    for line in headings(question):
        console.print(Text(line), soft_wrap=True)
    if answer.candidates:
        console.print(ratios_table(answer.candidates[:top]))
    for unsplit in answer.unsplit:
        console.print(Text(describe_unsplit(unsplit)), soft_wrap=True)
    console.print(Text(f"simulated: {answer.verdict}", style="bold"), soft_wrap=True)
    for line in remarks(question, answer):
        console.print(Text(line), style="dim", soft_wrap=True, highlight=False)


def headings(question: Question) -> list[str]:
    """What was asked, with the bytes of each side."""
    wire, card = question.wire, question.card
    name = "link" if question.link is None else question.link.id
    each_way = card.hidden_size * wire.out_bytes_per_element, card.hidden_size * wire.back_bytes_per_element
    return [
        f"{card.id}, {question.context_tokens:,} tokens of context, at most {question.tpot_seconds * 1e3:g} ms a token",
        f"attention on {question.attention_chip.id}: "
        f"{format_bytes(side_weight_bytes(card, 'attention', question.precision))} of weights a worker, and the KV",
        f"FFN on {question.ffn_chip.id}: "
        f"{format_bytes(side_weight_bytes(card, 'ffn', question.precision))} of weights a worker, no requests",
        f"{name}: {format_amount(wire.attention_bytes_per_second, 'B/s')} a port and direction, "
        f"{format_amount(wire.latency_seconds, 's')}; a token crosses with {each_way[0]:,.0f} B out and "
        f"{each_way[1]:,.0f} B home in each of {card.num_layers} layers",
    ]


def ratios_table(candidates: tuple[Candidate, ...]) -> Table:
    """One line a ratio."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    priced = all(each.per_usd is not None for each in candidates)
    powered = all(each.per_joule is not None for each in candidates)
    extra = [name for name, known in (("tok/$", priced), ("tok/J", powered)) if known]
    for name in ("A chips", "F chips", "A worker", "F worker", "micro-batches", "batch", "TPOT", "tok/s/chip",
                 *extra, "exposed", "A idle", "F idle", "waits for", "batch ends at"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("A worker", "F worker", "waits for") else "right")
    for each in candidates:
        table.add_row(
            f"{each.attention_chips}",
            f"{each.ffn_chips}",
            escape(_short(each.attention_parallel)),
            escape(_short(each.ffn_parallel)),
            f"{each.micro_batches}",
            f"{each.batch}",
            f"{each.tpot_seconds * 1e3:.1f} ms",
            f"{each.per_chip:,.0f}",
            *([f"{each.per_usd:,.0f}"] if priced and each.per_usd is not None else []),
            *([f"{each.per_joule:,.2f}"] if powered and each.per_joule is not None else []),
            f"{each.exposed_share:.1%}",
            f"{each.attention_bubble:.0%}",
            f"{each.ffn_bubble:.0%}",
            each.bound,
            each.batch_limit,
        )
    return table


def _short(parallel: Parallel) -> str:
    """`EP128 TP2 PP2`: ways of experts, of each matrix, and stages."""
    pieces = parallel.tensor if parallel.expert == 1 else parallel.expert_tensor
    named = (("EP", parallel.expert), ("TP", pieces), ("PP", parallel.pipeline))
    return " ".join(f"{name}{value}" for name, value in named if value > 1) or "1 chip"


def describe_unsplit(unsplit: Unsplit) -> str:
    """One line."""
    usd = "" if unsplit.per_usd is None else f", {unsplit.per_usd:,.0f} tok/$"
    joule = "" if unsplit.per_joule is None else f", {unsplit.per_joule:,.2f} tok/J"
    return (
        f"unsplit: {unsplit.parallel.num_chips} x {unsplit.chip} ({describe_split(unsplit.parallel)}), batch "
        f"{unsplit.batch}, {unsplit.tpot_seconds * 1e3:.1f} ms a token, {unsplit.per_chip:,.0f} tok/s/chip{usd}{joule}"
    )


def remarks(question: Question, answer: Answer) -> list[str]:
    """What has to be said beside the verdict."""
    lines: list[str] = []
    if answer.break_even_cost is not None and question.attention_chip.id != question.ffn_chip.id:
        if answer.break_even_cost > 0:
            lines.append(
                f"an FFN chip may cost or draw up to {answer.break_even_cost:.2f} of an attention chip for a split to "
                "be worth as much as no split"
            )
        else:
            lines.append("no split is worth as much as no split, even if FFN chips cost nothing")
    if answer.candidates and answer.events_seconds is not None:
        closed = answer.candidates[0].tpot_seconds
        lines.append(
            f"the best one played event by event: {answer.events_seconds * 1e3:.2f} ms a token, "
            f"closed form {closed * 1e3:.2f} ms"
        )
    low, high = answer.interval
    lines.append(f"durations within a factor of {low:.2f} to {high:.2f} in 80 % of measured cases of this basis")
    lines += [f"not possible: {why}" for why in answer.refused]
    lines += list(answer.assumptions)
    return lines


def as_json(question: Question, answer: Answer) -> bytes:
    """The answer with the question's numbers, in base units."""
    asked = {
        "model": question.card.id,
        "attention_chip": question.attention_chip.id,
        "ffn_chip": question.ffn_chip.id,
        "wire": question.wire,
        "link": None if question.link is None else question.link.id,
        "context_tokens": question.context_tokens,
        "tpot_seconds": question.tpot_seconds,
        "precision": question.precision,
        "best_by": question.objective,
    }
    return msgspec.json.encode({"simulated": True, "question": asked, "answer": answer})
