"""Writes docs/catalog.md from the catalog. `--check` writes nothing and exits with 1 if the file is out of date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from transload.hardware.catalog import chip_names, link_names, load_chip, load_link, load_model, model_names, sources
from transload.hardware.chip import Chip
from transload.hardware.link import LinkKind
from transload.hardware.model_card import ModelCard
from transload.hardware.model_facts import count_parameters, kv_bytes_per_token, weight_bytes
from transload.hardware.quantity import Kind, Quantity, format_amount
from transload.hardware.show_models import attention_words, experts_words

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "catalog.md"
MARKS: dict[Kind, str] = {"datasheet": "", "measured": "ᵐ", "vendor claim": "ᵛ", "estimate": "ᵉ", "assumption": "ᵃ"}

INTRO = """\
# Chips, links and models

<!-- Written by scripts/catalog_page.py from src/transload/hardware. Do not edit by hand. -->

Every number knows its source and its class: *datasheet*, *measured* (ᵐ), *vendor claim* (ᵛ) or *estimate* (ᵉ). Peaks
are dense and as published, never derated; sparse and unqualified peaks are kept apart. `-` is unknown: a result that
needs it is refused by name, unless you supply a value.

```
transload chips                    all chips                transload links                all kinds of link
transload chips trainium2          one, number by number    transload models               all models
transload chips ./mine.yaml        a file of your own       transload models ./config.json any Hugging Face config
transload models deepseek-v3 --batch 64 --context 8192 --kv fp8
transload chips rubin_cpx --assume "rubin_cpx.dense_flops.fp4=20 PFLOP/s"
```

`--json` prints the same for programs, in base units (B, B/s, FLOP/s, s, W, USD).
"""
OWN_CHIP = """\
## A chip of your own

A file like this works wherever a chip's name does, by path. Units may have k, M, G, T, P before them (or Ki, Mi, Gi for
sizes); `class` is datasheet, measured, vendor claim, estimate or assumption; what is left out is unknown.

```yaml
{example}```

A misspelt key, a wrong unit or a number without its source is refused with file, line and field. A memory tier may say
what it `holds` (weights, kv, activations, prefixes; the first three if nothing is said); several tiers are listed from
fast to large. Numbers go by path: `memory.hbm.bandwidth`, `scale_up.latency`, `power.tdp`, `price.per_hour`.

## A model of your own

Any `config.json` of a decoder-only transformer, by path or by the folder it is in: grouped-query and latent attention
(MLA), mixtures of experts, sliding windows, tied embeddings, quantised weights. A family that is not known is counted
by its keys, with a remark; state-space and linear-attention layers are refused. Nothing is fetched from a hub.
"""
FORMULAS = """\
## What follows from a model

| quantity | formula |
|---|---|
| KV of a token | layers x 2 x KV heads x head dimension; MLA: layers x (latent rank + rotary dimension) |
| KV of a request | sliding layers keep the window and no more |
| prefill FLOPs | 2 per weight and token, 4 x heads x dimension per pair of tokens that attend, the last logits |
| decode FLOPs | the same for one token; MLA absorbed: 2 x heads x (2 x latent rank + rotary dimension) per pair |
| experts touched | E x (1 - (1 - k/E)^batch), or with a power law of popularity (`--skew`) |
| decode reads | every weight once, experts only if touched, every request's cache |
| ridge point | dense peak / bandwidth of the tier that holds the weights |

Weights in 4-bit formats count their shared scales (MXFP4: 4.25 bits, NVFP4: 4.5). `active` is what one token is
multiplied with: the output head counts, the look-up in the input embedding does not.
"""


def render() -> str:
    """The whole page."""
    chips = [load_chip(name) for name in chip_names()]
    links = [load_link(name) for name in link_names()]
    models = [load_model(name) for name in model_names()]
    example = (DOCS / "example-chip.yaml").read_text(encoding="utf-8")
    parts = [INTRO, "## Chips\n", *_chip_table(chips), "\n## Links\n", *_link_table(links)]
    parts += ["\n## Models\n", *_model_table(models), f"\n{FORMULAS}", OWN_CHIP.format(example=example)]
    parts += [
        "## What is not known\n",
        *_unknown(chips, links),
        "\n## Where sources disagree\n",
        *_conflicts(chips, links),
    ]
    parts += ["\n## Sources\n", *_sources()]
    return "\n".join(parts) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _head(*names: str) -> Iterator[str]:
    yield _row(names)
    yield "|" + "---|" * len(names)


def _cell(quantity: Quantity | None) -> str:
    return "-" if quantity is None else f"{quantity}{MARKS[quantity.kind]}"


def _tera(quantity: Quantity | None) -> str:
    return "-" if quantity is None else f"{quantity.value / 1e12:,.5g}{MARKS[quantity.kind]}"


def _chip_table(chips: list[Chip]) -> Iterator[str]:
    yield from _head("chip", "", "16-bit TF", "FP8 TF", "FP4 TF", "memory", "TDP", "scale-up, one way", "price, hour")
    for chip in chips:
        peaks = chip.dense_flops
        memory = ", ".join(f"{tier.tier} {_cell(tier.capacity)} @ {_cell(tier.bandwidth)}" for tier in chip.memory)
        world = f" x {chip.scale_up.world_size}" if chip.scale_up.world_size else ""
        numbers = [_tera(peak) for peak in (peaks.bf16 or peaks.fp16, peaks.fp8, peaks.fp4)]
        rest = [_cell(chip.power.tdp), _cell(chip.scale_up.bandwidth) + world, _cell(chip.price.per_hour)]
        yield _row([f"`{chip.id}`", chip.name, *numbers, memory, *rest])


def _link_table(links: list[LinkKind]) -> Iterator[str]:
    yield from _head("link", "", "bandwidth", "latency", "measured", "counts")
    for link in links:
        numbers = [_cell(number) for number in (link.bandwidth, link.latency, link.measured_bandwidth)]
        scope = link.scope if link.kind == "link" else f"{link.kind}: {link.scope}"
        yield _row([f"`{link.id}`", link.name, *numbers, scope])


def _model_table(models: list[ModelCard]) -> Iterator[str]:
    yield from _head(
        "model", "layers", "hidden", "attention", "experts", "parameters", "published", "active", "weights", "KV, token"
    )
    for card in models:
        count = count_parameters(card)
        yield _row(
            [
                f"`{card.id}`",
                str(card.num_layers),
                str(card.hidden_size),
                attention_words(card),
                experts_words(card),
                f"{count.total:,}",
                "-" if card.published.total is None else f"{card.published.total.value:,.0f}",
                format_amount(count.active, "parameters"),
                format_amount(weight_bytes(card), "B"),
                f"{kv_bytes_per_token(card):,} B",
            ]
        )


def _unknown(chips: list[Chip], links: list[LinkKind]) -> Iterator[str]:
    yield from _head("number", "why")
    for described in (*chips, *links):
        for entry in described.unknown:
            yield _row([f"`{described.id}.{entry.quantity}`", entry.why])


def _conflicts(chips: list[Chip], links: list[LinkKind]) -> Iterator[str]:
    yield from _head("number", "in use", "also said")
    for described in (*chips, *links):
        for path, quantity in described.quantities():
            if quantity.conflicts:
                others = [
                    f"{format_amount(other.value, other.unit)} ({', '.join(filter(None, (other.source, other.note)))})"
                    for other in quantity.conflicts
                ]
                used = f"{quantity}{MARKS[quantity.kind]} ({', '.join(quantity.sources)})"
                yield _row([f"`{described.id}.{path}`", used, "; ".join(others)])


def _sources() -> Iterator[str]:
    yield from _head("key", "source", "licence", "remark")
    for source in sources().values():
        title = f"[{source.title}]({source.url})" if source.url else source.title
        yield _row([source.key, title, source.licence, source.note])


def main() -> int:
    """Exit code: 0; 1 if `--check` finds the page out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the page is up to date")
    page = render()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    sys.stderr.write(f"{PAGE} is out of date; run: python scripts/catalog_page.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
