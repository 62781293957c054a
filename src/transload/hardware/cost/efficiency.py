"""What share of a peak the operations of a class of chips reach, and what they cost besides. Owns the parameters.

The numbers stand in `efficiency/*.json`, one file a class, and say there what they rest on. The peaks themselves are
the catalog's and are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from transload.errors import DeploymentError
from transload.hardware.chip import Chip, ChipKind, Format
from transload.hardware.cost.known import known
from transload.hardware.nearest import did_you_mean
from transload.hardware.precision import DType

FOLDER = Path(__file__).parent / "efficiency"
ClassName = Literal["gpu", "asic", "rdu", "lpu", "wafer", "cpu"]
CLASS_OF: dict[ChipKind, ClassName] = {
    "gpu": "gpu",
    "asic": "asic",
    "rdu": "rdu",
    "lpu": "lpu",
    "wafer": "wafer",
    "wafer-system": "wafer",
    "cpu": "cpu",
}
ENGINES = ("generic", "trtllm", "vllm", "sglang")


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of operation: seconds = max(flops / (peak * compute * m / (m + half)), bytes / (bandwidth * memory))
    + floor. `m` is what the operation saturates in: rows of a matrix, tokens an expert, tokens of context."""

    compute: float
    half: float = 0.0
    memory: float
    floor_seconds: float = 0.0
    width: float = 0.0
    """For experts, one more factor: 1 / (1 + width / columns), where a chip holds so many columns of one expert.
    Experts cut into narrow pieces are multiplied slowly."""


class Collective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A collective: base + per_doubling * log2(chips) + hops * link latency + bytes / (bandwidth * share)."""

    base_seconds: float
    doubling_seconds: float = 0.0
    link_hops: float = 0.0
    """Times the link's own latency and log2(chips): for chips whose links are the whole of the latency."""
    share: float
    across_seconds: float = 0.0
    """On top where the chips are in more than one scale-up domain."""
    across_share: float | None = None
    """Of the bandwidth of either link where the chips are in more than one domain, by libraries made for that;
    None: the same share."""


class Overhead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine spends besides its kernels: scheduling, sampling, launches."""

    step_seconds: float
    layer_seconds: float
    sequence_seconds: float
    prefill_step_seconds: float = 0.0
    """On top in a step with prefill: it runs without a captured graph."""
    request_seconds: float = 0.0
    """Before the first step and after it: HTTP, templates, the way to the client. Adds to TTFT and occupies no chip."""
    prompt_token_seconds: float = 0.0
    """The same, for each token of the prompt: tokenising and moving it."""
    stream_seconds: float = 0.0
    """The same, for each request in flight: the front end serves all their streams in turn."""


class Routing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How unevenly tokens go to experts."""

    skew: float = 0.0
    """Exponent of the power law of `experts_touched`."""
    imbalance: float = 1.0
    """Busiest rank's tokens / mean, over what chance alone would give."""
    overlap: float = 0.8
    """Share of the exchange between scale-up domains that hides behind the computing of another half of the batch, as
    far as there is any (DeepSeek open-infra-index, day 6; LMSYS, large-scale expert parallelism). An estimate."""


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All parameters of one class of chips."""

    name: ClassName
    basis: str
    """Where the numbers come from; printed with every result that rests on them."""
    measured: bool
    chips: tuple[str, ...] = ()
    """Ids of the chips that the fit has seen."""
    gemm: dict[Format, Curve]
    grouped_gemm: dict[Format | Literal["fp8_dealt", "mxfp4", "mxfp4_wide"], Curve]
    """By the format multiplied in; mxfp4 weights have kernels of their own, and others (wide) where they expand. dealt:
    of libraries for experts that are dealt out beyond one scale-up domain."""
    attention_prefill: Curve
    attention_decode: Curve
    mla_prefill: Curve
    mla_decode: Curve
    elementwise: Curve
    all_reduce: Collective
    all_to_all: Collective
    p2p: Collective
    overhead: dict[str, Overhead]
    routing: Routing = Routing()
    memory_share: float = 0.9
    """Of a tier's capacity, what weights and KV may fill: the rest is workspace and the engine's own."""


@cache
def efficiency_of_class(name: ClassName) -> Efficiency:
    """The committed parameters of a class."""
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=Efficiency)


def efficiency_of(chip: Chip) -> Efficiency:
    """The parameters that a chip's operations follow: those of its class."""
    return efficiency_of_class(CLASS_OF[chip.kind])


def overhead_of(efficiency: Efficiency, engine: str) -> Overhead:
    """An engine's overhead; `generic` stands for one that was not measured on this class.

    Raises `DeploymentError` for an engine that nobody knows.
    """
    if engine not in ENGINES:
        raise DeploymentError(f"no such engine: {engine}{did_you_mean(engine, ENGINES)}; known: {', '.join(ENGINES)}")
    return efficiency.overhead.get(engine, efficiency.overhead["generic"])


def compute_format(chip: Chip, dtype: DType) -> Format:
    """The arithmetic that multiplies weights of this format: the chip's own if it has it, else a wider one.

    4-bit weights on a chip without 4-bit arithmetic are expanded to 16 bits, or to fp8 where that is all there is;
    mxfp4 is multiplied with fp8 activations where the chip has 4-bit arithmetic (as released for gpt-oss).
    """
    wanted: tuple[Format, ...]
    numbers = known(chip)
    four_bits = "dense_flops.fp4" in numbers
    match dtype:
        case "float32":
            wanted = ("fp32",)
        case "bfloat16" | "float16":
            wanted = ("bf16", "fp16", "fp8")
        case "fp8":
            wanted = ("fp8", "bf16", "fp16")
        case "int8":
            wanted = ("int8", "bf16", "fp16")
        case "nvfp4":
            wanted = ("fp4", "bf16", "fp16", "fp8")
        case "mxfp4":
            wanted = ("fp8", "bf16", "fp16") if four_bits else ("bf16", "fp16", "fp8")
        case "int4":
            wanted = ("bf16", "fp16", "fp8")
    for number_format in wanted:
        if f"dense_flops.{number_format}" in numbers:
            return number_format
    headline = [name for name in wanted if f"headline_flops.{name}" in numbers]
    chip.peak(headline[0] if headline else wanted[0])  # refuses by name
    raise AssertionError(f"{chip.id} has no {wanted[0]} and does not say so")


def grouped_curve(efficiency: Efficiency, dtype: DType, number_format: Format, *, wide: bool = False) -> Curve:
    """The curve of routed experts stored in `dtype` and multiplied in `number_format`; `wide`: dealt out beyond one
    scale-up domain."""
    if wide and number_format == "fp8" and "fp8_dealt" in efficiency.grouped_gemm:
        return efficiency.grouped_gemm["fp8_dealt"]
    expanded: Literal["mxfp4", "mxfp4_wide"] = "mxfp4" if number_format in ("fp8", "fp4") else "mxfp4_wide"
    own = efficiency.grouped_gemm.get(expanded) if dtype == "mxfp4" else None
    return own if own is not None else curve_for(efficiency.grouped_gemm, number_format)


def curve_for(curves: Mapping[Any, Curve], number_format: Format) -> Curve:
    """The curve of a format, or of the nearest that has one: fp16 as bf16, int8 as fp8, the rest as bf16."""
    nearest: dict[Format, Format] = {"fp16": "bf16", "int8": "fp8", "fp4": "fp8", "tf32": "bf16", "fp32": "bf16"}
    found = curves.get(number_format) or curves.get(nearest.get(number_format, "bf16"))
    return found if found is not None else curves["bf16"]
