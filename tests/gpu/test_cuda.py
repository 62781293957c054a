"""The same code on a CUDA device: numerics against `transformers`, exactness, KV staged for the links, real servers.

Skipped where there is no CUDA device. The servers' workers share one GPU, which is enough to see every byte cross.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.live import LiveServer
from tests.model.stepping import Stepper, arch_of, stepper_of, tensors_of
from tests.model.test_llama import oracle_logits, oracle_of, prompt_of
from tests.model.tiny_models import saved, tiny_model
from tests.model.tiny_tokenizers import byte_level, saved_tokenizer
from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling
from transload.model.build import build_model
from transload.model.executor import TorchExecutor
from transload.transfer.layout import KvLayout, kv_layout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
FAMILIES = ["smollm2", "llama-llama3", "llama-biases", "llama-one-kv-head", "mistral", "qwen2", "qwen3"]
FAMILIES += ["qwen3_moe", "mixtral", "gpt_oss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str) -> None:
    oracle = oracle_of(name)
    made = stepper_of(oracle, device="cuda")
    running = made.add(prompt_of(70))
    made.prefill(running, chunk_tokens=29)
    for _ in range(20):
        want = oracle_logits(oracle, running.tokens[:-1])
        torch.testing.assert_close(made.logits[0].cpu(), want, atol=2e-3, rtol=1e-3)
        assert running.tokens[-1] == int(want.argmax())
        made.step((running, 1))


def test_requests_in_one_batch_get_the_tokens_they_get_alone() -> None:
    oracle = oracle_of("qwen3")
    alone, together = stepper_of(oracle, device="cuda"), stepper_of(oracle, device="cuda", seed=9)
    prompts = [prompt_of(length) for length in (9, 40, 1, 25, 100)]
    want = [alone.generate(alone.add(prompt), 12) for prompt in prompts]
    work = [together.add(prompt) for prompt in prompts]
    while any(running.num_outputs < 12 for running in work):
        together.step(*((running, 16) for running in work if running.num_outputs < 12))
    assert [running.outputs for running in work] == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_mode_gives_the_same_bits_whatever_the_batch_and_the_chunks(dtype: torch.dtype) -> None:
    oracle = oracle_of("smollm2")

    def made(seed: int) -> Stepper:
        return stepper_of(oracle, device="cuda", dtype=dtype, deterministic=True, seed=seed)

    alone, crowd = made(0), made(3)
    first, second = alone.add(prompt_of(61)), crowd.add(prompt_of(61))
    others = [crowd.add(prompt_of(length)) for length in (7, 90)]
    alone.prefill(first)
    crowd.step((others[0], None), (second, 23), (others[1], None))
    crowd.step((others[0], 1), (second, None), (others[1], 1))
    for _ in range(12):
        alone.step((first, 1))
        crowd.step((others[1], 1), (second, 1), (others[0], 1))
        assert torch.equal(alone.logits[0], crowd.logits[1])


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_recorded_steps_give_the_tokens_of_steps_that_are_launched(name: str) -> None:
    oracle = oracle_of(name)
    recorded, launched = stepper_of(oracle, device="cuda"), stepper_of(oracle, device="cuda")
    launched.executor._graphs = None
    crowds = [[made.add(prompt_of(length), max_tokens=128) for length in (9, 40, 100)] for made in (recorded, launched)]
    for made, crowd in zip((recorded, launched), crowds, strict=True):
        for running in crowd:
            made.prefill(running)
    for number in range(90):  # the third joins late and the second leaves early, so shapes change and come again
        present = [place for place in range(3) if not (place == 2 and number < 30) and not (place == 1 and number > 60)]
        for made, crowd in zip((recorded, launched), crowds, strict=True):
            made.step(*((crowd[place], 1) for place in present))
        torch.testing.assert_close(recorded.logits, launched.logits, atol=1e-3, rtol=1e-3)
    assert [running.tokens for running in crowds[0]] == [running.tokens for running in crowds[1]]
    graphs = recorded.executor._graphs
    assert graphs is not None
    assert 2 <= len(graphs._recordings) <= 40


def test_a_handoff_through_host_memory_goes_on_with_the_same_tokens() -> None:
    oracle = oracle_of("qwen3")
    arch = arch_of(oracle)
    layout = kv_layout(arch, "test", 4, "float32")
    prompt = tuple(prompt_of(19))

    def executor(buffer: bytearray) -> TorchExecutor:
        model = build_model(arch, tensors_of(oracle, arch), torch.float32, False, torch.device("cuda"))
        return TorchExecutor(model, layout, 12, buffer=buffer, staged=True, layers_per_frame=1)

    here, there = bytearray(12 * layout.block_bytes), bytearray(12 * layout.block_bytes)
    source_blocks, target_blocks = [7, 2, 9, 4, 1], [3, 8, 0, 5, 10, 6, 11]
    first = _prefill(executor(here), prompt, source_blocks)
    for source, target in zip(source_blocks, target_blocks, strict=False):
        _copy_block(here, source, there, target, layout)
    tokens = [*prompt, first]
    receiver = executor(there)
    arrived = tuple(target_blocks[:5])
    for _ in range(6):
        chunk = Chunk(_request(prompt), len(tokens) - 1, 1, tokens, target_blocks, True, len(tokens) - len(prompt))
        tokens.append(receiver.run_step(RunStep(2, (chunk,), arrived), lambda *_: None).sampled[0].token)
        arrived = ()
    alone = stepper_of(oracle, device="cuda")
    assert tokens[len(prompt) :] == alone.generate(alone.add(prompt), 7)


def _request(prompt: tuple[int, ...]) -> Request:
    return Request(RequestId(1), len(prompt), 8, Sampling(temperature=0.0), prompt)


def _prefill(worker: TorchExecutor, prompt: tuple[int, ...], blocks: list[int]) -> int:
    for start in range(0, len(prompt), 8):
        num_tokens = min(8, len(prompt) - start)
        last = start + num_tokens == len(prompt)
        chunk = Chunk(
            _request(prompt), start, num_tokens, prompt, blocks, last, 0, streams=True, num_sent_blocks=start // 4
        )
        done = worker.run_step(RunStep(1, (chunk,)), lambda *_: None)
    return done.sampled[0].token


def _copy_block(here: bytearray, source: int, there: bytearray, target: int, layout: KvLayout) -> None:
    size = layout.block_bytes
    there[target * size : (target + 1) * size] = here[source * size : (source + 1) * size]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tiny_model("qwen3").float().eval(), tmp_path_factory.mktemp("model") / "tiny")
    saved_tokenizer(byte_level(), folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("--topology", "1agg", "--set", "pools.aggregated.device=cuda"),
        ("--topology", "1p1d", "--set", "pools.prefill.device=cuda", "--set", "pools.decode.device=cuda"),
        ("--topology", "1p1d", "--set", "pools.prefill.device=cuda"),  # a GPU prefills, the CPU decodes
    ],
    ids=["aggregated", "both on the GPU", "prefill on the GPU, decode on the CPU"],
)
def test_a_server_answers_as_transformers_computes(arguments: tuple[str, ...], checkpoint: Path) -> None:
    oracle = tiny_model("qwen3").float().eval()
    prompt = prompt_of(200)
    with torch.inference_mode():
        expected = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
    options = ("--model", str(checkpoint), "--dtype", "float32", "--set", "router.local_prefill=fallback")
    with LiveServer(*options, *arguments) as server:
        for _ in range(2):  # the second time out of the prefix cache
            answer = server.client.completions.create(
                model="default",
                prompt=prompt,
                max_tokens=12,
                temperature=0,
                logprobs=0,
                extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.tokens == [f"token_id:{token}" for token in expected]


def test_a_decode_worker_on_the_gpu_that_is_killed_loses_no_text(checkpoint: Path) -> None:
    options = ("--model", str(checkpoint), "--dtype", "float32", "--topology", "1p1d")
    devices = ("--set", "pools.prefill.device=cuda", "--set", "pools.decode.device=cuda")

    def text(server: LiveServer, *, kill: bool) -> str:
        stream = server.client.completions.create(
            model="default", prompt=prompt_of(50), max_tokens=200, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        parts: list[str] = []
        for event in stream:
            parts.append(event.choices[0].text if event.choices else "")
            if kill and len(parts) == 20:
                server.kill("decode-0")
        return "".join(parts)

    with LiveServer(*options, *devices) as server:
        undisturbed = text(server, kill=False)
        assert text(server, kill=True) == undisturbed
