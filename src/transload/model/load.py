"""From a worker's plan to an executor with its model loaded and warm: what a worker process does before it is ready."""

from __future__ import annotations

import torch

from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling
from transload.deploy.plan import WorkerPlan
from transload.errors import MachineError
from transload.model.build import build_model
from transload.model.checkpoint import load_tensors
from transload.model.executor import TorchExecutor
from transload.model.source import locate
from transload.transfer.layout import kv_layout
from transload.transfer.memory import KvMemory


def build_executor(plan: WorkerPlan) -> tuple[TorchExecutor, KvMemory]:
    """Load the plan's model and allocate its KV pool.

    Raises `CheckpointError` for model files that cannot be used and `MachineError` for a device or memory that is not
    there.
    """
    torch.set_num_threads(plan.threads)
    if plan.device.startswith("cuda") and not torch.cuda.is_available():
        raise MachineError(f"{plan.name}: device {plan.device!r}, but torch finds no CUDA device; use device: cpu")
    files = locate(plan.model)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    tensors = load_tensors(files, dtype)
    model = build_model(files.arch, tensors, dtype, plan.model.deterministic, torch.device(plan.device))
    layout = kv_layout(files.arch, files.identity, plan.block_size, plan.dtype)
    memory = KvMemory(layout, plan.num_blocks)
    executor = TorchExecutor(
        model,
        layout,
        plan.num_blocks,
        buffer=memory.buffer,
        staged=plan.device != "cpu",
        threads=plan.threads,
        layers_per_frame=plan.layers_per_frame or files.arch.num_layers,
    )
    warm_up(executor, plan.block_size)
    return executor, memory


def _no_listener(_low: int, _high: int) -> None:
    """Nobody waits for the layers of a warm-up."""


def warm_up(executor: TorchExecutor, block_size: int) -> None:
    """One prompt and one token through the model, so that the first caller does not pay for first uses."""
    prompt = tuple(range(block_size + 1))
    request = Request(RequestId(0), len(prompt), 2, Sampling(temperature=0.0), prompt)
    blocks = list(range(min(2, executor.num_blocks)))
    if len(blocks) * block_size < len(prompt) + 1:
        return
    chunk = Chunk(request, 0, len(prompt), list(prompt), blocks, samples=True, num_outputs=0)
    executor.run_step(RunStep(0, (chunk,)), _no_listener)
    chunk = Chunk(request, len(prompt), 1, [*prompt, 0], blocks, samples=True, num_outputs=1)
    executor.run_step(RunStep(0, (chunk,)), _no_listener)
