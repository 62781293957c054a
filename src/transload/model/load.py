"""From a worker's plan to an executor with its model loaded and warm: what a worker process does before it is ready."""

from __future__ import annotations

import torch

from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling
from transload.deploy.plan import WorkerPlan
from transload.errors import MachineError
from transload.model.build import build_attention_model, build_model
from transload.model.checkpoint import load_tensors
from transload.model.executor import TorchExecutor
from transload.model.ffn_side import FfnSide
from transload.model.ffn_source import TorchFfnSource, build_side
from transload.model.freeing import give_back_memory
from transload.model.inventory import is_feed_forward
from transload.model.layer_driver import LocalDriver
from transload.model.llama import FfnCall
from transload.model.native.library import load as native_library
from transload.model.source import locate
from transload.transfer.layout import kv_layout
from transload.transfer.memory import KvMemory


def build_executor(plan: WorkerPlan) -> tuple[TorchExecutor, KvMemory, TorchFfnSource]:
    """Load the plan's model, or its attention side if feed-forwards are computed elsewhere, and allocate its KV pool.

    Raises `CheckpointError` for model files that cannot be used and `MachineError` for a device or memory that is not
    there.
    """
    _prepare(plan)
    files = locate(plan.model)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    device = torch.device(plan.device)
    if plan.hop is None:
        keep_groups = plan.model.dtype == "quantized" and plan.device == "cpu" and not plan.model.deterministic
        tensors = load_tensors(files, dtype, keep_groups=keep_groups)
        model = build_model(files.arch, tensors, dtype, plan.model.deterministic, device)
    else:
        tensors = load_tensors(files, dtype, lambda name: not is_feed_forward(name))
        model = build_attention_model(files.arch, tensors, dtype, plan.model.deterministic, device)
    give_back_memory()
    layout = kv_layout(files.arch, files.identity, plan.block_size, plan.dtype)
    works_in_place = plan.device == "cpu" and not {"auto", "direct"}.isdisjoint(plan.transports.values())
    memory = KvMemory(
        layout,
        plan.num_blocks,
        with_windows=works_in_place,
        shared=bool(plan.links),
        resident=plan.role != "prefill",  # which sends and is never sent to
    )
    memory.kernels = native_library()
    executor = TorchExecutor(
        model,
        layout,
        plan.num_blocks,
        buffer=memory.table,
        staged=plan.device != "cpu",
        threads=plan.threads,
        layers_per_frame=plan.layers_per_frame or files.arch.num_layers,
        driver=None if plan.hop is None else _NoFeedForwards(),
    )
    warm_up(executor, plan.block_size)
    executor.record_steps(Request(RequestId(0), 1, 2, Sampling(temperature=0.0), (0,)), plan.limits.max_batch)
    return executor, memory, TorchFfnSource(plan, files, model, executor)


def build_ffn(plan: WorkerPlan) -> FfnSide:
    """Load the feed-forwards of an FFN worker, and nothing else. Raises as `build_executor`."""
    _prepare(plan)
    side = build_side(plan, locate(plan.model))
    give_back_memory()
    return side


def _prepare(plan: WorkerPlan) -> None:
    torch.set_num_threads(plan.threads)
    if plan.device.startswith("cuda") and not torch.cuda.is_available():
        raise MachineError(f"{plan.name}: device {plan.device!r}, but torch finds no CUDA device; use device: cpu")


class _NoFeedForwards(LocalDriver):
    """Answers with nothing: warms an attention side up before there is anybody to ask."""

    def __init__(self) -> None:
        super().__init__(())

    def answer(self, call: FfnCall) -> torch.Tensor:
        return torch.zeros_like(call.hidden)


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
