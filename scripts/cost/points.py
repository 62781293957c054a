"""The measured end-to-end points as records: which model, split and precision a row means, and which rows mean none.

Repairs what the source writes ambiguously, by rules that look at the configuration only, never at the latency.
"""

from __future__ import annotations

import csv
import gzip
import re
from dataclasses import dataclass

from kernels import TABLES, load_chip_once

from transload.hardware.catalog import load_model
from transload.hardware.model_card import ModelCard
from transload.hardware.parallel import Parallel
from transload.hardware.precision import DType, Precision

CARDS = {
    "DeepSeek-R1": "deepseek-v3",
    "DeepSeek-V3": "deepseek-v3",
    "DeepSeek-V3.1-NVFP4": "deepseek-v3",
    "gpt-oss-120b": "gpt-oss-120b",
    "MiniMax-M2.5": "minimax-m2.5",
    "Llama-3.1-70B": "llama-3.1-70b",
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-32B-NVFP4": "qwen3-32b",
    "GLM-5": "glm-5",
    "Kimi-K2.5": "kimi-k2",
}
NOT_COUNTED = {"Qwen3.5-397B-A17B": "linear-attention layers"}
RANGE_RATIO = 0.9
"""InferenceX draws lengths evenly from 80 % to 100 % of the nominal ones."""
WAVES = 10
"""InferenceX sends ten times as many requests as are in flight, after twice as many to warm up. The other campaign does
not say; taken as the same."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    id: str
    campaign: str
    run: str
    """Configuration, engine build and date: points of one run differ in load only."""
    mode: str
    backend: str
    chip: str
    model: str
    card: ModelCard
    precision: Precision
    parallel: Parallel
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    ttft: float
    tpot: float
    prefill_parallel: Parallel | None = None
    prefill_workers: int = 1
    decode_workers: int = 1

    @property
    def dense(self) -> bool:
        return self.card.experts is None


@dataclass(frozen=True)
class Refused:
    """A row that is not evaluated, and why."""

    id: str
    why: str


_cards: dict[str, ModelCard] = {}


def card_of(model: str) -> ModelCard:
    name = CARDS[model]
    if name not in _cards:
        _cards[name] = load_model(name)
    return _cards[name]


def read_points() -> tuple[list[Point], list[Refused]]:
    """Every distinct measurement of the table once: its sources overlap."""
    with gzip.open(TABLES / "e2e_points.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    points: list[Point] = []
    refused: list[Refused] = []
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        tpot, ttft = float(row["silicon_tpot_ms"]), float(row["silicon_ttft_ms"])
        key = (*(row[name] for name in ("mode", "backend", "system", "isl", "osl")), f"{tpot:.2f}", f"{ttft:.1f}")
        if key in seen:
            refused.append(Refused(row["id"], "the same measurement as an earlier row"))
            continue
        seen.add(key)
        found = _point(row, ttft / 1e3, tpot / 1e3)
        if isinstance(found, Point):
            points.append(found)
        else:
            refused.append(Refused(row["id"], found))
    return points, refused


def _number(text: str, default: int = 0) -> int:
    return int(float(text)) if text else default


def _point(row: dict[str, str], ttft: float, tpot: float) -> Point | str:
    model = row["model_path"].rpartition("/")[2]
    if model in NOT_COUNTED:
        return f"the model has {NOT_COUNTED[model]}, which are refused by name"
    source = row["silicon_data_source"]
    match = re.search(r"silicon_concurrency=(\d+)", source)
    if match is None:
        return "requests in flight are not stated"
    card = card_of(model)
    campaign = "other" if "auto-gap" in source else "inferencex"
    scale = RANGE_RATIO if campaign == "inferencex" else 1.0
    measured = re.search(r"measured=([^;T]*)", source)
    common = {
        "id": row["id"],
        "campaign": campaign,
        "mode": row["mode"],
        "backend": row["backend"],
        "chip": row["system"],
        "model": model,
        "card": card,
        "precision": precision_of(row, card, campaign),
        "concurrency": int(match[1]),
        "prompt_tokens": round(int(row["isl"]) * scale),
        "output_tokens": round(int(row["osl"]) * scale),
        "ttft": ttft,
        "tpot": tpot,
    }
    if row["mode"] == "agg":
        split = aggregated_split(row, card, campaign, int(match[1]))
    else:
        split = disaggregated_split(row, card)
    if isinstance(split, str):
        return split
    run = "|".join(
        (row["mode"], row["backend"], row["backend_version"], row["system"], model, row["precision"], row["isl"],
         row["osl"], str(split.get("parallel")), measured[1] if measured else "")
    )  # fmt: skip
    return Point(**common, **split, run=run)  # type: ignore[arg-type]


def precision_of(row: dict[str, str], card: ModelCard, campaign: str) -> Precision:
    """Storage by part. fp4 checkpoints of mixtures keep attention in 16 bits; gpt-oss is stored one way only."""
    blackwell = row["system"] in ("b200_sxm", "gb200")
    small = row["backend"] == "trtllm" or (campaign == "inferencex" and blackwell)
    if card.id == "gpt-oss-120b":
        return Precision(attention="bfloat16", experts="mxfp4", kv="fp8" if small else "bfloat16")
    match row["precision"]:
        case "fp8":
            kv: DType = "fp8" if small or (campaign == "inferencex" and card.experts is None) else "bfloat16"
            if row["model_path"].startswith("nvidia/"):  # these checkpoints come with scales for an fp8 cache
                kv = "fp8"
            return Precision(attention="fp8", dense_ffn="fp8", experts="fp8", kv=kv)
        case "fp4" if card.experts is not None:
            return Precision(attention="bfloat16", dense_ffn="nvfp4", experts="nvfp4", kv="fp8")
        case "fp4":
            return Precision(attention="nvfp4", dense_ffn="nvfp4", kv="fp8")
        case _:
            weights: DType = "fp8" if "FP8" in row["model_path"] else "bfloat16"
            return Precision(attention=weights, dense_ffn=weights, experts=weights, kv="bfloat16")


def aggregated_split(row: dict[str, str], card: ModelCard, campaign: str, concurrency: int) -> dict[str, object] | str:
    """InferenceX states chips and expert parallelism; the table multiplies them where both are above one."""
    tensor, data = _number(row["tp_size"], 1), max(1, _number(row["attention_dp_size"], 1))
    expert_tensor, expert = max(1, _number(row["moe_tp_size"], 1)), max(1, _number(row["moe_ep_size"], 1))
    chips = tensor * data
    if campaign == "inferencex" and card.experts is not None:
        if row["system"] == "gb200" and chips >= 12 and expert == 1:
            return "states the chips of a whole deployment as one aggregated worker"
        if expert_tensor == expert and expert_tensor**2 == chips and expert > 1:
            chips = expert
        elif tensor == data and expert == tensor * data and data > 1:
            chips = expert = tensor
        data = chips if data > 1 else 1
        tensor = chips // data
    replicas = 1
    if campaign == "other" and row["batch_size"]:
        replicas = max(1, round(concurrency / float(row["batch_size"]) / data))
        if replicas == tensor > 1 and card.experts is not None:  # attention by data, which the column leaves blank
            tensor, data, replicas = 1, tensor, 1
    if card.experts is None:
        expert = 1
    if chips > 8 and row["system"] != "gb200":
        return "states more chips than the node has"
    found = _checked(card, tensor, data, expert, "parallel")
    return found if isinstance(found, str) else found | {"decode_workers": replicas}


def disaggregated_split(row: dict[str, str], card: ModelCard) -> dict[str, object] | str:
    sides: dict[str, object] = {}
    for side, field in (("prefill", "prefill_parallel"), ("decode", "parallel")):
        workers = _number(row[f"{side}_num_workers"])
        if not workers:
            return "states no number of workers"
        tensor = _number(row[f"{side}_tp_size"], 1)
        data = max(1, _number(row[f"{side}_attention_dp_size"], 1))
        expert = max(1, _number(row[f"{side}_moe_ep_size"], 1))
        if data > 1 and expert == 1:  # left at its default: where attention is by data, experts are dealt out whole
            expert = tensor * data
        found = _checked(card, tensor, data, 1 if card.experts is None else expert, field)
        if isinstance(found, str):
            return found
        sides |= found
        sides[f"{side}_workers"] = workers
    return sides


def _checked(card: ModelCard, tensor: int, data: int, expert: int, field: str) -> dict[str, object] | str:
    if (tensor * data) % expert:
        expert = 1
    if card.attention.num_heads % tensor or (card.experts and card.experts.num_experts % expert):
        return f"states a split that does not divide the model: tensor {tensor}, data {data}, expert {expert}"
    return {field: Parallel(tensor=tensor, data_attention=data, expert=expert)}


def chip_of(point: Point):  # type: ignore[no-untyped-def]
    return load_chip_once(point.chip)
