"""A cache that is not the memory the links use: what leaves is put into that memory, what came is fetched from it."""

from __future__ import annotations

import torch

from tests.model.stepping import arch_of, tensors_of
from tests.model.tiny_models import tiny_model
from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling
from transload.model.build import build_model
from transload.model.executor import TorchExecutor
from transload.transfer.layout import KvLayout, kv_layout

BLOCKS, BLOCK_SIZE, CHUNK = 12, 4, 8
PROMPT = tuple(range(5, 24))  # 19 tokens: four full blocks and a part of one


def executor(buffer: bytearray | None, layout: KvLayout, name: str) -> TorchExecutor:
    oracle = tiny_model(name)
    arch = arch_of(oracle)
    model = build_model(arch, tensors_of(oracle, arch), torch.float32, True, torch.device("cpu"))
    return TorchExecutor(model, layout, BLOCKS, buffer=buffer, staged=buffer is not None, layers_per_frame=1)


def request(max_tokens: int) -> Request:
    return Request(RequestId(1), len(PROMPT), max_tokens, Sampling(temperature=0.0), PROMPT)


def prefill(worker: TorchExecutor, blocks: list[int], on_layers: object = None) -> int:
    """In chunks, as a sender would; returns the first token."""
    for start in range(0, len(PROMPT), CHUNK):
        num_tokens = min(CHUNK, len(PROMPT) - start)
        last = start + num_tokens == len(PROMPT)
        chunk = Chunk(
            request(8), start, num_tokens, PROMPT, blocks, last, 0, streams=True, num_sent_blocks=start // BLOCK_SIZE
        )
        done = worker.run_step(RunStep(1, (chunk,)), on_layers or (lambda *_: None))  # type: ignore[arg-type]
    return done.sampled[0].token


def decode(worker: TorchExecutor, blocks: list[int], first: int, arrived: tuple[int, ...] = ()) -> list[int]:
    tokens = [*PROMPT, first]
    for _ in range(6):
        chunk = Chunk(request(8), len(tokens) - 1, 1, tokens, blocks, True, len(tokens) - len(PROMPT))
        done = worker.run_step(RunStep(2, (chunk,), arrived), lambda *_: None)
        tokens.append(done.sampled[0].token)
        arrived = ()
    return tokens[len(PROMPT) :]


def test_a_handoff_through_host_memory_goes_on_with_the_same_tokens() -> None:
    arch = arch_of(tiny_model("qwen3"))
    layout = kv_layout(arch, "test", BLOCK_SIZE, "float32")
    here, there = bytearray(BLOCKS * layout.block_bytes), bytearray(BLOCKS * layout.block_bytes)
    alone = executor(None, layout, "qwen3")
    expected = decode(alone, [0, 1, 2, 3, 4, 5, 6], prefill(alone, [0, 1, 2, 3, 4, 5, 6]))

    source_blocks, target_blocks = [7, 2, 9, 4, 1], [3, 8, 0, 5, 10, 6, 11]
    first = prefill(executor(here, layout, "qwen3"), source_blocks)
    for source, target in zip(source_blocks, target_blocks, strict=False):
        size = layout.block_bytes
        there[target * size : (target + 1) * size] = here[source * size : (source + 1) * size]
    receiver = executor(there, layout, "qwen3")
    assert decode(receiver, target_blocks, first, tuple(target_blocks[:5])) == expected


def test_layers_are_in_host_memory_when_they_are_reported() -> None:
    arch = arch_of(tiny_model("qwen3"))
    layout = kv_layout(arch, "test", BLOCK_SIZE, "float32")
    host = bytearray(BLOCKS * layout.block_bytes)
    reported: list[bool] = []

    def look(layer_lo: int, layer_hi: int) -> None:
        cell = 7 * layout.block_bytes + layer_lo * layout.cell_bytes
        reported.append(any(host[cell : cell + layout.cell_bytes]))

    prefill(executor(host, layout, "qwen3"), [7, 2, 9, 4, 1], look)
    assert reported
    assert all(reported)
