"""The numbers that are fitted, where they start, how far they may move, and how they become an `Efficiency`.

Starts of arithmetic and memory come from the fits of single kernels; overheads start from what engines are known to
need and move freely.
"""

from __future__ import annotations

import msgspec
from least_squares import Parameter

from transload.hardware.cost.efficiency import Collective, Curve, Efficiency, Overhead, Routing

FORMATS = ("bf16", "fp8", "fp4")
GROUPED = (*FORMATS, "mxfp4", "mxfp4_wide")
BACKENDS = ("trtllm", "vllm", "sglang")
FITTED_CHIPS = ("b200_sxm", "gb200", "h100_sxm", "h200_sxm")
NODE_SHARE = 0.77
"""Of NVLink and of a 400 Gb/s port, that exchanges between nodes reach: DeepEP states 153 GB/s of 200, and 43 to 58 of
50 (its README, H800). Hardly a point here crosses nodes."""
LIGHT = 1.0
"""No share of a peak passes it."""


def parameters(kernels: dict[str, dict[str, float]]) -> list[Parameter]:
    """`kernels`: the curves of single kernels by kind, as `kernel_curves` gives them."""
    found: list[Parameter] = []
    for number_format in FORMATS:
        curve = kernels[f"gemm.{number_format}"]
        found += [
            Parameter(f"gemm.{number_format}.compute", curve["compute"], 0.12),
            Parameter(f"gemm.{number_format}.half", curve["half"], 0.5),
            Parameter(f"gemm.{number_format}.memory", curve["memory"], 0.12),
        ]
    for number_format in GROUPED:
        curve = kernels[f"grouped.{number_format}"]
        found += [
            Parameter(f"grouped.{number_format}.compute", curve["compute"], 0.2),
            Parameter(f"grouped.{number_format}.half", curve["half"], 0.5),
            Parameter(f"grouped.{number_format}.memory", curve["memory"], 0.2),
            Parameter(f"grouped.{number_format}.width", curve["width"], 0.4),
        ]
    curve = kernels["grouped.fp8_dealt"]
    found += [Parameter(f"grouped.fp8_dealt.{name}", curve[name], 0.05) for name in ("compute", "half", "memory")]
    found += [
        Parameter("grouped.floor", 1e-5, 1.0),
        Parameter("attention_prefill.compute", kernels["attention_prefill"]["compute"], 0.25),
        Parameter("attention_prefill.half", kernels["attention_prefill"]["half"], 0.5),
        Parameter("attention_decode.memory", kernels["attention_decode"]["memory"], 0.25),
        Parameter("mla_decode.memory", kernels["mla_decode"]["memory"], 0.3),
        Parameter("mla_decode.compute", min(0.8, kernels["mla_decode"]["compute"]), 0.3),
        Parameter("mla_prefill.compute", kernels["mla_prefill"]["compute"], 0.12),
        Parameter("mla_prefill.half", kernels["mla_prefill"]["half"], 0.15),
        Parameter("mla.floor", 1e-5, 1.0),
        Parameter("elementwise.memory", 0.6, 0.5),
        Parameter("all_reduce.base", kernels["all_reduce"]["base"], 0.7),
        Parameter("all_reduce.doubling", kernels["all_reduce"]["doubling"], 0.7),
        Parameter("all_reduce.share", kernels["all_reduce"]["share"], 0.4),
        Parameter("all_to_all.base", 1.5e-5, 0.7),
        Parameter("all_to_all.doubling", 3e-6, 0.7),
        Parameter("all_to_all.share", kernels["all_to_all"]["share"], 0.2),
    ]
    for backend in BACKENDS:
        found += [
            Parameter(f"{backend}.step", 6e-4, 1.0),
            Parameter(f"{backend}.layer", 2e-5, 1.0),
            Parameter(f"{backend}.sequence", 1e-5, 1.0),
            Parameter(f"{backend}.prefill_step", 3e-3, 1.5),
            Parameter(f"{backend}.request", 2e-2, 1.5),
            Parameter(f"{backend}.prompt_token", 5e-6, 1.5),
            Parameter(f"{backend}.stream", 2e-4, 1.5),
        ]
    return found


def efficiency(values: dict[str, float], basis: str = "fit") -> Efficiency:
    """Fitted numbers as the parameters of the class of GPUs."""

    def curve(compute: str, memory: str, half: str | None = None, floor: float = 0.0) -> Curve:
        return Curve(
            compute=min(values[compute], LIGHT), half=0.0 if half is None else values[half],
            memory=min(values[memory], LIGHT), floor_seconds=floor,
        )  # fmt: skip

    def matrices(kind: str, formats: tuple[str, ...], floor: float) -> dict[str, Curve]:
        curves = {f: curve(f"{kind}.{f}.compute", f"{kind}.{f}.memory", f"{kind}.{f}.half", floor) for f in formats}
        widths = {f: values.get(f"{kind}.{f}.width", 0.0) for f in formats}
        return {f: msgspec.structs.replace(found, width=widths[f]) for f, found in curves.items()}

    def collective(kind: str) -> Collective:
        return Collective(
            base_seconds=values[f"{kind}.base"], doubling_seconds=values[f"{kind}.doubling"],
            share=min(values[f"{kind}.share"], LIGHT), across_seconds=2e-5,
        )  # fmt: skip

    def overhead(backend: str) -> Overhead:
        return Overhead(
            step_seconds=values[f"{backend}.step"], layer_seconds=values[f"{backend}.layer"],
            sequence_seconds=values[f"{backend}.sequence"], prefill_step_seconds=values[f"{backend}.prefill_step"],
            request_seconds=values[f"{backend}.request"], prompt_token_seconds=values[f"{backend}.prompt_token"],
            stream_seconds=values[f"{backend}.stream"],
        )  # fmt: skip

    engines = {backend: overhead(backend) for backend in BACKENDS}
    return Efficiency(
        name="gpu", basis=basis, measured=True, chips=FITTED_CHIPS,
        gemm=matrices("gemm", FORMATS, 0.0),  # type: ignore[arg-type]
        grouped_gemm=matrices("grouped", (*GROUPED, "fp8_dealt"), values["grouped.floor"]),  # type: ignore[arg-type]
        attention_prefill=curve("attention_prefill.compute", "attention_decode.memory", "attention_prefill.half"),
        attention_decode=Curve(compute=0.6, memory=min(values["attention_decode.memory"], LIGHT)),
        mla_prefill=curve("mla_prefill.compute", "mla_decode.memory", "mla_prefill.half", values["mla.floor"]),
        mla_decode=curve("mla_decode.compute", "mla_decode.memory", floor=values["mla.floor"]),
        elementwise=Curve(compute=1.0, memory=min(values["elementwise.memory"], LIGHT)),
        all_reduce=collective("all_reduce"),
        all_to_all=msgspec.structs.replace(collective("all_to_all"), across_share=NODE_SHARE),
        p2p=Collective(base_seconds=1e-5, share=0.8),
        overhead={"generic": _median(list(engines.values())), **engines},
        routing=Routing(),
    )  # fmt: skip


def _median(engines: list[Overhead]) -> Overhead:
    """The middle engine, number by number: what stands for one that was not measured."""
    fields = Overhead.__struct_fields__
    middle = {name: sorted(getattr(engine, name) for engine in engines)[len(engines) // 2] for name in fields}
    return Overhead(**middle)
