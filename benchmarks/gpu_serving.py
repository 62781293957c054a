"""Serving on one CUDA device: what a served token takes, beside the engine's own step of the same batch.

    python benchmarks/gpu_serving.py [--shape llama-1b] [--device cuda] [--out gpu_serving.json]

Writes a checkpoint of that shape with random bfloat16 weights and serves it, first by one aggregated worker, then by a
prefill and a decode worker that share the device. Always so many callers at once (512 tokens in, 128 out, by
`transload bench`). `times_step` is a served token's median time over a decode step of that batch at the median
context, run in a process of its own before the servers start: above 1 is what scheduling, messages, the front end and
prefills beside decodes cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from surroundings import surroundings, write_report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from watched_server import WatchedServer

from gpu import SHAPES, Steps, config_of, random_tensors, seconds_of
from transload.arch import ModelArch
from transload.model.hf_config import read_arch

INPUT_TOKENS, OUTPUT_TOKENS = 512, 128
CONTEXT = INPUT_TOKENS + OUTPUT_TOKENS // 2
CALLERS = (1, 8, 32)
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "1agg": ("--topology", "1agg", "--set", "pools.aggregated.device={device}"),
    "1p1d": (
        *("--topology", "1p1d", "--set", "pools.prefill.device={device}", "--set", "pools.decode.device={device}"),
        *("--set", "router.local_prefill=fallback"),
    ),
}


def arch_of(shape: str) -> ModelArch:
    return read_arch(config_of(shape), name=shape, path=Path("config.json"))


def write_checkpoint(shape: str, device: str, folder: str) -> None:
    """Random weights, and a tokenizer with a word for every id: prompts are ids, and answers must have text."""
    target = Path(folder)
    config = {**config_of(shape), "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(arch_of(shape), torch.device(device))
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġ{number}" for number in range(config["vocab_size"] - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(target / "tokenizer.json"))


def time_steps(shape: str, answers: Any) -> None:
    """Seconds of a decode step by batch."""
    blocks = max(CALLERS) * (CONTEXT // 16 + 2)
    steps = Steps(arch_of(shape), torch.device("cuda"), blocks)
    answers.put({batch: seconds_of(steps.decode(batch, CONTEXT), 7) for batch in CALLERS})


def in_a_process(work: Any, *arguments: Any) -> None:
    """So that the device's memory is free again afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join(300)
    if process.exitcode != 0:
        process.kill()
        raise SystemExit(f"{work.__name__} failed (exit code {process.exitcode}); its output is above")


def load(url: str, callers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "transload", "bench", url, "--concurrency", str(callers), "--json", "-"]
    command += ["--requests", str(max(8, 3 * callers)), "--warmup", str(callers), "--seed", str(callers)]
    command += ["--input", str(INPUT_TOKENS), "--output", str(OUTPUT_TOKENS), "--prompt", "ids", "--ids", "1000:20000"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    summary: dict[str, Any] = json.loads(done.stdout)["summary"]
    return summary


def serve(folder: str, device: str, steps: dict[int, float]) -> list[dict[str, Any]]:
    rows = []
    for topology, arguments in TOPOLOGIES.items():
        words = [argument.format(device=device) for argument in arguments]
        with WatchedServer(["--model", folder, "--dtype", "bfloat16", *words]) as server:
            for callers in CALLERS:
                summary = load(server.url, callers)
                tpot = summary["tpot_seconds"]["p50"]
                row = {
                    "topology": topology,
                    "callers": callers,
                    "failed": summary["num_failed"],
                    "ttft_ms": round(1e3 * summary["ttft_seconds"]["p50"], 1),
                    "tpot_ms": round(1e3 * tpot, 2),
                    "itl_p99_ms": round(1e3 * summary["itl_seconds"]["p99"], 2),
                    "tokens_per_second": round(summary["output_tokens_per_second"], 1),
                }
                if callers in steps:
                    row |= {"step_ms": round(1e3 * steps[callers], 2), "times_step": round(tpot / steps[callers], 2)}
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script itself; steps are not timed")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu_serving.py: torch finds no CUDA device", file=sys.stderr)
        return 2
    folder = tempfile.mkdtemp(prefix="transload-bench-")
    try:
        in_a_process(write_checkpoint, options.shape, options.device, folder)
        steps: dict[int, float] = {}
        if options.device != "cpu":
            answers = multiprocessing.get_context("spawn").SimpleQueue()
            in_a_process(time_steps, options.shape, answers)
            steps = answers.get()
        rows = serve(folder, options.device, steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = {
        "benchmark": "gpu_serving",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **surroundings(commit=options.commit),
        "shape": options.shape,
        "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "rows": rows,
    }
    write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
