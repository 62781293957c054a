"""Efficiency curves from tables of measured kernels: one set of numbers a kind of operation, over all chips at once."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from least_squares import Parameter, Vector, fit

from transload.hardware.catalog import load_chip
from transload.hardware.cost.known import number, peak
from transload.hardware.cost.plan import ENTERED, SHUFFLES

TABLES = Path(__file__).parents[2] / "silicon"
CHIPS = ("h100_sxm", "h200_sxm", "b200_sxm", "gb200", "b300_sxm", "gb300")
"""Hopper and Blackwell data centre parts. A100 and L40S are left out of the fit and reported as chips not seen."""
WIDTH = {
    "w4a16_mxfp4": 0.53125,
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "nvfp4": 0.5625,
    "w4a8_mxfp4_mxfp8": 0.53125,
}
FORMAT = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "nvfp4": "fp4", "w4a8_mxfp4_mxfp8": "fp8"}


PLAIN = {"bf16": ("bfloat16",), "fp8": ("fp8", "fp8_block"), "fp4": ("nvfp4",), "mxfp4": (), "mxfp4_wide": ()}
MIXED = {"mxfp4": ("w4a8_mxfp4_mxfp8",), "mxfp4_wide": ("w4a16_mxfp4",)}
"""Formats of weights that are multiplied in another: mxfp4 in fp8 on chips with 4-bit arithmetic, else in 16 bits."""
SHUFFLE_SHARE = 0.8
"""Of the bandwidth, at which rows go to their experts and back; the end-to-end fit has a number of its own."""


class Table:
    """Columns of a table as arrays, with the chip's own numbers beside each row."""

    def __init__(self, name: str, keep: Callable[[dict[str, str]], bool]) -> None:
        with gzip.open(TABLES / f"{name}.csv.gz", "rt") as file:
            self.rows = [row for row in csv.DictReader(file) if keep(row)]

    def __getitem__(self, name: str) -> Vector:
        return np.array([float(row[name]) for row in self.rows])

    def text(self, name: str) -> list[str]:
        return [row[name] for row in self.rows]

    def of_chip(self, path: str) -> Vector:
        return np.array([number(load_chip_once(row["system"]), path) for row in self.rows])

    def peaks(self, formats: list[str]) -> Vector:
        return np.array(
            [peak(load_chip_once(row["system"]), name) for row, name in zip(self.rows, formats, strict=True)]
        )

    @property
    def seconds(self) -> Vector:
        return self["latency"] / 1e3


_chips: dict[str, object] = {}
ALIASES = {"a100_sxm": "a100_80g_sxm"}


def load_chip_once(name: str):  # type: ignore[no-untyped-def]
    found = _chips.get(name)
    if found is None:
        found = _chips[name] = load_chip(ALIASES.get(name, name))
    return found


def curve_parameters(compute: float, half: float, memory: float, floor: float) -> list[Parameter]:
    return [
        Parameter("compute", compute, 1.0),
        Parameter("half", half, 2.0),
        Parameter("memory", memory, 1.0),
        Parameter("floor", floor, 2.0),
    ]


def roofline(
    flops: Vector, saturates: Vector, peaks: Vector, moved: Vector, bandwidth: Vector
) -> Callable[[dict[str, float]], Vector]:
    """Seconds of the curve of `efficiency.Curve` as a function of its four numbers."""

    def seconds(values: dict[str, float]) -> Vector:
        counting = flops / (peaks * values["compute"]) * (1 + values["half"] / saturates)
        reading = moved / (bandwidth * values["memory"])
        return np.maximum(counting, reading) + values["floor"]

    return seconds


def fit_curve(table: Table, seconds: Callable[[dict[str, float]], Vector], start: list[Parameter]) -> dict[str, float]:
    measured = np.log(table.seconds)
    return fit(start, lambda values, _rows: np.log(seconds(values)) - measured, scale=0.2, steps=40)


def report(name: str, table: Table, seconds: Vector) -> str:
    errors = np.abs(seconds / table.seconds - 1)
    return f"{name:<34} {len(errors):>6} points, error median {np.median(errors):6.1%}, mean {np.mean(errors):6.1%}"


def gemm(number_format: str, chips: tuple[str, ...] = CHIPS):  # type: ignore[no-untyped-def]
    table = Table("gemm", lambda row: row["system"] in chips and FORMAT.get(row["gemm_dtype"]) == number_format)
    m, n, k = table["m"], table["n"], table["k"]
    width = np.array([WIDTH[name] for name in table.text("gemm_dtype")])
    moved = n * k * width + m * k * np.maximum(width, 1) + 2 * m * n
    return table, roofline(
        2 * m * n * k, m, table.peaks([number_format] * len(m)), moved, table.of_chip("memory.hbm.bandwidth")
    )


def moe(number_format: str, chips: tuple[str, ...] = CHIPS, distribution: str = "balanced"):  # type: ignore[no-untyped-def]
    """Latency of the first rank of a group of experts, whose share of the rows is exact: they are dealt out evenly."""
    table = Table(
        "moe",
        lambda row: (
            row["system"] in chips
            and row["moe_dtype"] in MIXED.get(number_format, PLAIN[number_format])
            and row["distribution"] == distribution
        ),
    )
    tokens, hidden, experts, per_token = (table[c] for c in ("num_tokens", "hidden_size", "num_experts", "topk"))
    inner, ranks = table["inter_size"] / table["moe_tp_size"], table["moe_ep_size"]
    assigned, touched = evenly_dealt(tokens, experts, per_token, experts / ranks)
    width = np.array([WIDTH[name] for name in table.text("moe_dtype")])
    weights = 3 * hidden * inner
    moved = touched * weights * width + assigned * 2 * (2 * hidden + 3 * inner)
    bandwidth = table.of_chip("memory.hbm.bandwidth")
    shuffle = 2 * hidden * (SHUFFLES * assigned + ENTERED * tokens) / (bandwidth * SHUFFLE_SHARE)
    multiplied = {"mxfp4": "fp8", "mxfp4_wide": "bf16"}.get(number_format, number_format)
    counting = 2 * weights * assigned / table.peaks([multiplied] * len(tokens))

    def seconds(values: dict[str, float]) -> Vector:
        slowed = (1 + values["half"] * touched / assigned) * (1 + values["width"] / inner)
        result: Vector = np.maximum(counting / values["compute"] * slowed, moved / (bandwidth * values["memory"]))
        return result + values["floor"] + shuffle

    return table, seconds


def evenly_dealt(tokens: Vector, experts: Vector, per_token: Vector, local: Vector) -> tuple[Vector, Vector]:
    """(rows, experts with rows) of the first `local` experts, where token i goes to the experts i + j * stride, modulo
    their number, for each j below `per_token`: how the measured rows were dealt out."""
    stride = np.ceil(experts / per_token)
    whole, rest = np.divmod(tokens, experts)
    rows = whole * per_token * local
    for j in range(int(per_token.max())):
        # tokens i below `rest` with (i + start) mod experts below `local`
        start = (j * stride) % experts
        here = np.clip(np.minimum(local, start + rest) - start, 0, None)
        here += np.clip(np.minimum(start + rest - experts, local), 0, None)
        rows += np.where(j < per_token, here, 0)
    return np.maximum(rows, 1e-9), np.minimum(local, np.maximum(rows, 1e-9))


def dealt() -> tuple[Table, Callable[[dict[str, float]], Vector]]:
    """DeepGEMM's published rates of fp8 products with block scales in the shapes of DeepSeek-V3's experts."""
    table = Table("deepgemm", lambda row: (row["n"], row["k"]) in (("4096", "7168"), ("7168", "2048")))
    groups, m, n, k = (table[column] for column in ("groups", "m", "n", "k"))
    moved = groups * (m * k + n * k + 2 * m * n)
    flops = 2 * groups * m * n * k
    return table, roofline(flops, m, table.peaks(["fp8"] * len(m)), moved, table.of_chip("memory.hbm.bandwidth"))


def attention_prefill(chips: tuple[str, ...] = CHIPS):  # type: ignore[no-untyped-def]
    table = Table("attention_prefill", lambda row: row["system"] in chips and row["attn_dtype"] == "bfloat16")
    batch, tokens, heads, dim = (table[c] for c in ("batch_size", "isl", "num_heads", "head_dim"))
    pairs = batch * tokens * (tokens + 1) / 2
    moved = batch * tokens * 2 * dim * (2 * heads + 2 * table["num_key_value_heads"])
    return table, roofline(
        4 * heads * dim * pairs, tokens, table.peaks(["bf16"] * len(batch)), moved,
        table.of_chip("memory.hbm.bandwidth"),
    )  # fmt: skip


def attention_decode(chips: tuple[str, ...] = CHIPS):  # type: ignore[no-untyped-def]
    table = Table("attention_decode", lambda row: row["system"] in chips)
    context = table["batch_size"] * (table["isl"] + table["step"])
    width = np.array([WIDTH[name] for name in table.text("kv_cache_dtype")])
    moved = context * 2 * table["num_key_value_heads"] * table["head_dim"] * width
    flops = context * 4 * table["num_heads"] * table["head_dim"]
    return table, roofline(
        flops, np.full(len(context), 1e30), table.peaks(["bf16"] * len(context)), moved,
        table.of_chip("memory.hbm.bandwidth"),
    )  # fmt: skip


def mla_projections(table: Table, rows: Vector, curves: dict[str, dict[str, float]]) -> Vector:
    """The tables of latent attention time the whole block, its matrices included; these are the seconds of those,
    by the curves of plain matrix products. Per token: query down and up, latent down and up, output (DeepSeek-V3)."""
    heads = table["num_heads"]
    weights = 7168 * (1536 + 576) + 1536 * heads * 192 + 512 * heads * 256 + 7168 * heads * 128
    formats = ["fp8" if "fp8" in name else "bf16" for name in table.text("gemm_type")]
    width = np.array([1.0 if name == "fp8" else 2.0 for name in formats])
    compute, half, memory = (
        np.array([curves[f"gemm.{f}"][key] for f in formats]) for key in ("compute", "half", "memory")
    )
    counting = 2 * weights * (rows + half) / (table.peaks(formats) * compute)
    reading = weights * width / (table.of_chip("memory.hbm.bandwidth") * memory)
    slower: Vector = np.maximum(counting, reading)
    return slower


def mla_decode(curves: dict[str, dict[str, float]], chips: tuple[str, ...] = CHIPS):  # type: ignore[no-untyped-def]
    table = Table("mla_decode", lambda row: row["system"] in chips)
    context = table["batch_size"] * (table["isl"] + table["step"])
    width = np.array([WIDTH[name] for name in table.text("kv_cache_dtype")])
    flops = context * 2 * table["num_heads"] * (2 * 512 + 64)
    attention = roofline(
        flops, np.full(len(context), 1e30), table.peaks(["bf16"] * len(context)), context * 576 * width,
        table.of_chip("memory.hbm.bandwidth"),
    )  # fmt: skip
    projections = mla_projections(table, table["batch_size"], curves)
    return table, lambda values: attention(values) + projections


def mla_prefill(curves: dict[str, dict[str, float]], chips: tuple[str, ...] = CHIPS):  # type: ignore[no-untyped-def]
    table = Table("mla_prefill", lambda row: row["system"] in chips)
    batch, tokens, heads = table["batch_size"], table["isl"], table["num_heads"]
    pairs = batch * tokens * (tokens + 1) / 2
    attention = roofline(
        2 * heads * (128 + 64 + 128) * pairs, tokens, table.peaks(["bf16"] * len(batch)),
        batch * tokens * 2 * heads * 640, table.of_chip("memory.hbm.bandwidth"),
    )  # fmt: skip
    projections = mla_projections(table, batch * tokens, curves)
    return table, lambda values: attention(values) + projections


def all_reduce(chips: tuple[str, ...] = CHIPS) -> tuple[Table, Callable[[dict[str, float]], Vector]]:
    """The table counts elements of two bytes."""
    table = Table("all_reduce", lambda row: row["system"] in chips)
    chips_together, message = table["num_gpus"], 2 * table["message_size"]
    link = table.of_chip("scale_up.bandwidth")

    def seconds(values: dict[str, float]) -> Vector:
        sending = 2 * (chips_together - 1) / chips_together * message / (link * values["share"])
        result: Vector = values["base"] + values["doubling"] * np.log2(chips_together) + sending
        return result

    return table, seconds


def all_to_all(chips: tuple[str, ...] = CHIPS) -> tuple[Table, Callable[[dict[str, float]], Vector]]:
    """Dispatch and combine of DeepEP within a node, in 16 bits both ways; of its two kinds of kernels the faster."""
    table = Table("moe_all_to_all", lambda row: row["system"] in chips and row["comm_dtype"] == "bfloat16")
    fastest: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    columns = ("system", "ep_size", "hidden_size", "topk", "num_experts", "num_tokens")
    for row in table.rows:
        phases = fastest.setdefault(tuple(row[column] for column in columns), {})
        known = phases.get(row["phase"])
        if known is None or float(row["latency"]) < float(known["latency"]):
            phases[row["phase"]] = row
    table.rows = [
        phases["dispatch"] | {"latency": str(sum(float(row["latency"]) for row in phases.values()) / 1e3)}
        for phases in fastest.values()
        if len(phases) == 2
    ]
    ranks, tokens = table["ep_size"], table["num_tokens"]
    visited = ranks * (1 - (1 - 1 / ranks) ** table["topk"]) * (ranks - 1) / ranks
    sent = tokens * visited * table["hidden_size"] * 4
    link = table.of_chip("scale_up.bandwidth")

    def seconds(values: dict[str, float]) -> Vector:
        result: Vector = values["base"] + values["doubling"] * np.log2(ranks) + sent / (link * values["share"])
        return result

    return table, seconds


def kernel_curves(chips: tuple[str, ...] = CHIPS) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The curve of each kind of kernel, and a line about how well it fits."""
    start = curve_parameters
    kinds = {
        **{f"gemm.{name}": (gemm(name, chips), start(0.7, 64, 0.7, 3e-6)) for name in ("bf16", "fp8", "fp4")},
        **{
            f"grouped.{name}": (moe(name, chips), [*start(0.4, 32, 0.6, 1e-5), Parameter("width", 300, 1.5)])
            for name in ("bf16", "fp8", "fp4", "mxfp4", "mxfp4_wide")
        },
        "grouped.fp8_dealt": (dealt(), start(0.6, 64, 0.7, 1e-6)),
        "attention_prefill": (attention_prefill(chips), start(0.6, 1300, 0.6, 5e-6)),
        "attention_decode": (attention_decode(chips), start(0.6, 1, 0.6, 5e-6)),
        "all_to_all": (
            all_to_all(chips),
            [Parameter("base", 2e-5, 1), Parameter("doubling", 4e-6, 1), Parameter("share", 0.5, 1)],
        ),
        "all_reduce": (
            all_reduce(chips),
            [Parameter("base", 3e-6, 1), Parameter("doubling", 1e-6, 1), Parameter("share", 0.6, 1)],
        ),
    }
    curves: dict[str, dict[str, float]] = {}
    lines: list[str] = []
    for kind, ((table, seconds), parameters) in kinds.items():
        curves[kind] = fit_curve(table, seconds, parameters)
        lines.append(report(kind, table, seconds(curves[kind])))
    blocks = {"mla_prefill": mla_prefill(curves, chips), "mla_decode": mla_decode(curves, chips)}
    for kind, (table, seconds) in blocks.items():
        parameters = start(0.6, 1300, 0.6, 5e-6)
        curves[kind] = fit_curve(table, seconds, parameters)
        lines.append(report(kind, table, seconds(curves[kind])))
    return curves, lines
