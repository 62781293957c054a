"""One mixture of experts on the CPU: how long a layer takes by the number of rows, and how many experts it touches.

    python benchmarks/experts.py [--shape qwen3-30b-a3b] [--dtype bfloat16] [--threads 1] [--repeats 9] > experts.json

Random weights and rows, so each row's experts are as good as drawn by lot. A step of few rows is bound by reading the
weights of the experts it touches: `gigabytes_per_second` (10^9 bytes) says how fast they were read, beside a copy
of as much memory in the same run. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from transload.arch import ModelArch
from transload.model.build import WeightSource, build_experts, build_router
from transload.model.hf_config import read_arch
from transload.model.inventory import expected_shapes
from transload.study.provenance import machine_facts, versions

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 2},
    "qwen3-30b-a3b": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)


def arch_of(shape: str) -> ModelArch:
    keys = {"model_type": "qwen3_moe", "vocab_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    keys |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "norm_topk_prob": True}
    return read_arch(keys | SHAPES[shape], name=shape, path=Path(shape))


def median_seconds(what: Callable[[], object], repeats: int) -> float:
    what()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        what()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.inference_mode()
def measure(shape: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    arch = arch_of(shape)
    shapes = {name: size for name, size in expected_shapes(arch).items() if ".mlp." in name}
    tensors = {name: torch.randn(size).mul_(size[-1] ** -0.5).to(dtype) for name, size in shapes.items()}
    weights = WeightSource(arch, tensors, dtype, torch.device("cpu"), None)
    router, layer = build_router(weights, 0), build_experts(weights, 0)
    expert_bytes = arch.num_expert_parameters() * dtype.itemsize
    steps = []
    for num_rows in ROWS:
        hidden = torch.randn(num_rows, arch.hidden_size).to(dtype)
        touched = len(router(hidden).ids.unique())  # type: ignore[no-untyped-call]
        seconds = median_seconds(lambda hidden=hidden: layer(hidden, router(hidden)), repeats)  # type: ignore[misc]
        copied = torch.empty(touched * expert_bytes, dtype=torch.uint8)
        target = torch.empty_like(copied)
        copy_seconds = median_seconds(lambda target=target, copied=copied: target.copy_(copied), repeats)  # type: ignore[misc]
        steps.append(
            {
                "rows": num_rows,
                "experts_touched": touched,
                "milliseconds": 1e3 * seconds,
                "gigabytes_per_second": touched * expert_bytes / seconds / 1e9,
                "copy_gigabytes_per_second": touched * expert_bytes / copy_seconds / 1e9,
            }
        )
    return {"shape": shape, "experts": SHAPES[shape]["num_experts"], "expert_bytes": expert_bytes, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    found = measure(flags.shape, getattr(torch, flags.dtype), flags.repeats)
    settings = {"dtype": flags.dtype, "threads": flags.threads, "repeats": flags.repeats}
    json.dump(
        {**found, **settings, "machine": msgspec.to_builtins(machine_facts()), "versions": versions()},
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
