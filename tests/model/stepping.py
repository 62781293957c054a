"""Drives a `TorchExecutor` as an engine would: requests with blocks in no order, chunks, logits beside the tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from transload.arch import ModelArch
from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampled, Sampling, StepDone
from transload.model.build import build_model
from transload.model.executor import TorchExecutor
from transload.model.expert_storage import form_of, loaded_name
from transload.model.expert_tensors import ExpertUnpacker
from transload.model.hf_config import read_arch
from transload.model.sampler import Sampler
from transload.transfer.layout import KvLayout

GREEDY = Sampling(temperature=0.0)


def arch_of(oracle: Any) -> ModelArch:
    return read_arch(oracle.config.to_dict(), name="tiny", path=Path("config.json"))


def tensors_of(oracle: Any, arch: ModelArch) -> dict[str, torch.Tensor]:
    """An oracle's weights as a checkpoint of it is loaded."""
    state = {loaded_name(name, arch): tensor.detach().clone() for name, tensor in oracle.state_dict().items()}
    if arch.tied_embeddings:
        state.pop("lm_head.weight", None)
    unpacker = ExpertUnpacker(form_of(arch, state), oracle.dtype, lambda name: True)
    return {loaded: part for name, tensor in state.items() for loaded, part in unpacker.unpack(name, tensor)}


class Recorder(Sampler):
    """Keeps the logits it was shown last."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.empty(0)

    def sample(self, logits_RV: torch.Tensor, chunks: Sequence[Chunk]) -> tuple[Sampled, ...]:
        self.logits = logits_RV.float()
        return super().sample(logits_RV, chunks)


class Running:
    """A request between steps."""

    def __init__(self, request: Request, blocks: list[int]) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.blocks = blocks
        self.num_computed = 0

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.request.num_prompt_tokens

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.request.num_prompt_tokens :]


class Stepper:
    """An executor, its free blocks in a shuffled order, and the logits of its last step."""

    def __init__(
        self,
        arch: ModelArch,
        tensors: dict[str, torch.Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        deterministic: bool = False,
        block_size: int = 16,
        num_blocks: int = 160,
        seed: int = 0,
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        model = build_model(arch, tensors, dtype, deterministic, torch.device(device))
        layout = KvLayout(
            model="test",
            num_layers=arch.num_layers,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            block_size=block_size,
            dtype=str(dtype).removeprefix("torch."),
        )
        self.executor = TorchExecutor(model, layout, num_blocks, threads=threads)
        self.block_size = block_size
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self._num_steps = 0
        self._next_id = 0
        self._recorder = self.executor._sampler = Recorder()

    @property
    def logits(self) -> torch.Tensor:
        """Of the last step, float32, a row for each chunk that sampled."""
        return self._recorder.logits

    def add(self, prompt: Sequence[int], sampling: Sampling = GREEDY, max_tokens: int = 64) -> Running:
        self._next_id += 1
        request = Request(
            id=RequestId(self._next_id),
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            sampling=sampling,
            prompt=tuple(prompt),
        )
        num_blocks = -(-(len(prompt) + max_tokens) // self.block_size)
        assert num_blocks <= len(self.free)
        return Running(request, [self.free.pop() for _ in range(num_blocks)])

    def drop(self, running: Running) -> None:
        self.free += running.blocks

    def chunk(self, running: Running, num_tokens: int | None = None, streams: bool = False) -> Chunk:
        """The next `num_tokens` (None: all that are known) of a request."""
        left = len(running.tokens) - running.num_computed
        taken = left if num_tokens is None else min(num_tokens, left)
        return Chunk(
            request=running.request,
            start=running.num_computed,
            num_tokens=taken,
            tokens=running.tokens,
            blocks=running.blocks,
            samples=taken == left,
            num_outputs=running.num_outputs,
            streams=streams,
        )

    def step(self, *work: tuple[Running, int | None]) -> StepDone:
        """One step over these requests; drawn tokens are appended to them."""
        chunks = tuple(self.chunk(running, num_tokens) for running, num_tokens in work)
        done = self.run(chunks)
        drawn = {sampled.request: sampled.token for sampled in done.sampled}
        for (running, _), chunk in zip(work, chunks, strict=True):
            running.num_computed += chunk.num_tokens
            if chunk.samples:
                running.tokens.append(drawn[running.request.id])
        return done

    def run(self, chunks: tuple[Chunk, ...]) -> StepDone:
        self._num_steps += 1
        return self.executor.run_step(RunStep(step=self._num_steps, chunks=chunks), lambda low, high: None)

    def prefill(self, running: Running, chunk_tokens: int | None = None) -> None:
        """All chunks of a request's known tokens; its next token is drawn."""
        known = len(running.tokens)
        while len(running.tokens) == known:
            self.step((running, chunk_tokens))

    def generate(self, running: Running, num_tokens: int, chunk_tokens: int | None = None) -> list[int]:
        self.prefill(running, chunk_tokens)
        while running.num_outputs < num_tokens:
            self.step((running, 1))
        return running.outputs


def stepper_of(oracle: Any, **options: Any) -> Stepper:
    arch = arch_of(oracle)
    return Stepper(arch, tensors_of(oracle, arch), **options)
