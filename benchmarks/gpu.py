"""The engine on one CUDA device: prefill and decode rates beside `transformers` and the device's own limits.

    python benchmarks/gpu.py [--shape llama-1b] [--repeats 5] > gpu.json

Weights are random, in bfloat16: speed does not depend on their values. Rates are of whole steps as a worker runs them,
sampling included. The limits are a large matrix product and a large copy, measured in the same run; a decode step
cannot be faster than reading the weights and the keys once, a prefill not faster than its FLOPs.
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

import torch
from surroundings import surroundings

from transload.arch import ModelArch
from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling
from transload.model.build import build_model
from transload.model.executor import TorchExecutor
from transload.model.hf_config import read_arch
from transload.model.inventory import expected_shapes
from transload.transfer.layout import kv_layout

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
BLOCK_SIZE = 16


def config_of(shape: str) -> dict[str, Any]:
    from transformers import LlamaConfig

    config: dict[str, Any] = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192).to_dict()
    return config


def random_tensors(arch: ModelArch, device: torch.device) -> dict[str, torch.Tensor]:
    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return made.fill_(1.0) if "norm" in name else made.normal_(std=0.02)

    return {name: tensor(name, shape) for name, shape in expected_shapes(arch).items()}


class Steps:
    """Runs the executor's steps over made-up requests."""

    def __init__(self, arch: ModelArch, device: torch.device, num_blocks: int) -> None:
        model = build_model(arch, random_tensors(arch, device), torch.bfloat16, False, device)
        self._executor = TorchExecutor(model, kv_layout(arch, "bench", BLOCK_SIZE, "bfloat16"), num_blocks)
        self._number = 0

    def run(self, chunks: tuple[Chunk, ...]) -> None:
        self._number += 1
        self._executor.run_step(RunStep(self._number, chunks), lambda *_: None)

    def prefill(self, num_tokens: int) -> Callable[[], None]:
        chunk = self._chunk(0, 0, num_tokens, list(range(-(-(num_tokens + 1) // BLOCK_SIZE))))
        return lambda: self.run((chunk,))

    def decode(self, batch: int, context: int) -> Callable[[], None]:
        each = -(-(context + 1) // BLOCK_SIZE)
        chunks = tuple(
            self._chunk(row, context - 1, 1, list(range(row * each, (row + 1) * each))) for row in range(batch)
        )
        return lambda: self.run(chunks)

    def _chunk(self, row: int, start: int, num_tokens: int, blocks: list[int]) -> Chunk:
        length = start + num_tokens
        tokens = [(7 * place + row) % 1000 for place in range(length)]
        sampling = Sampling(temperature=0.0)
        prompt = tuple(tokens) if start == 0 else tuple(tokens[:-1])
        request = Request(RequestId(self._number * 1000 + row + 1), len(prompt), 64, sampling, prompt)
        return Chunk(request, start, num_tokens, tokens, blocks, True, 0 if start == 0 else 1)


def seconds_of(work: Callable[[], None], repeats: int) -> float:
    """Median of `repeats` runs after two that do not count."""
    times: list[float] = []
    for number in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def limits(device: torch.device) -> dict[str, float]:
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    source = torch.empty(2 * 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "gemm_flops_per_second": 2 * 8192**3 / seconds_of(lambda: torch.mm(a, b), 10),  # type: ignore[arg-type]
        "copy_bytes_per_second": 2 * source.numel() / seconds_of(lambda: target.copy_(source), 10),  # type: ignore[arg-type]
    }


def peers(shape: str, device: torch.device, cases: list[dict[str, int]], repeats: int) -> dict[str, float]:
    """The same steps by `transformers`: seconds by case."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(config)
        model.eval()
        torch.set_default_dtype(torch.float32)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for case in cases:
            if case["num_decode"] == 0:
                ids = torch.randint(1000, (1, case["tokens"]), device=device)
                found[key_of(case)] = seconds_of(
                    lambda ids=ids: model(ids, logits_to_keep=1).logits.argmax(-1),  # type: ignore[misc]
                    repeats,
                )
                continue
            batch, context = case["num_decode"], case["tokens"]
            cache: Any = DynamicCache(config=config)
            model(torch.randint(1000, (batch, context - 1), device=device), past_key_values=cache, logits_to_keep=1)
            one = torch.randint(1000, (batch, 1), device=device)

            def step(cache: Any = cache, one: torch.Tensor = one, length: int = context - 1) -> None:
                model(one, past_key_values=cache).logits[:, -1].argmax(-1).tolist()
                cache.crop(length - cache.get_seq_length())

            found[key_of(case)] = seconds_of(step, repeats)
    return found


def key_of(case: dict[str, int]) -> str:
    return f"decode {case['num_decode']} x {case['tokens']}" if case["num_decode"] else f"prefill {case['tokens']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: torch finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    arch = read_arch(config_of(arguments.shape), name=arguments.shape, path=Path("config.json"))
    cases = [{"num_decode": 0, "tokens": tokens} for tokens in (128, 512, 2048)]
    cases += [{"num_decode": batch, "tokens": 512} for batch in (1, 8, 32, 128)]
    measured = limits(device)
    steps = Steps(arch, device, 128 * 34)
    ours = {
        key_of(case): seconds_of(
            steps.decode(case["num_decode"], case["tokens"]) if case["num_decode"] else steps.prefill(case["tokens"]),
            arguments.repeats,
        )
        for case in cases
    }
    del steps
    torch.cuda.empty_cache()
    theirs = {} if arguments.no_peers else peers(arguments.shape, device, cases, arguments.repeats)
    rows = []
    weight_bytes = 2 * (arch.num_parameters() - arch.vocab_size * arch.hidden_size)
    for case in cases:
        key = key_of(case)
        num_tokens = case["num_decode"] or case["tokens"]
        kv_bytes = case["num_decode"] * case["tokens"] * arch.kv_bytes_per_token("bfloat16")
        floor = max(
            weight_bytes * num_tokens / measured["gemm_flops_per_second"],  # 2 FLOPs a weight, 2 bytes a weight
            (weight_bytes + kv_bytes) / measured["copy_bytes_per_second"],
        )
        row: dict[str, Any] = {**case, "seconds": ours[key], "tokens_per_second": num_tokens / ours[key]}
        row["share_of_limit"] = floor / ours[key]
        if key in theirs:
            row |= {"transformers_seconds": theirs[key], "times_transformers": theirs[key] / ours[key]}
        rows.append(row)
    result = {
        "schema": "transload-gpu-1",
        "device": torch.cuda.get_device_name(),
        **surroundings(("transformers",), arguments.commit),
        "shape": arguments.shape,
        "limits": measured,
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
