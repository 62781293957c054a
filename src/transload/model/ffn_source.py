"""Where a worker's feed-forwards are computed, and how that changes while it serves.

Loads the weights of feed-forwards, makes the driver that asks FFN workers, and swaps one for the other between two
steps. Never decides which of them is right: the front end says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from transload.control.ffn_client import FfnClientConfig
from transload.control.ffn_messages import Piece, SessionId
from transload.control.messages import WorkerId
from transload.deploy.plan import HopPlan, WorkerPlan
from transload.model.build import Tensors, build_feed_forwards, column_part
from transload.model.checkpoint import load_tensors
from transload.model.executor import TorchExecutor
from transload.model.ffn_pieces import (
    INDEX_DTYPE,
    Cutter,
    PieceFunctions,
    build_pieces,
    piece_stride,
    pieces_of,
)
from transload.model.ffn_side import FfnSide
from transload.model.freeing import give_back_memory
from transload.model.inventory import expert_of, is_feed_forward, layer_of
from transload.model.layer_driver import LocalDriver
from transload.model.llama import FeedForwardLayer, LlamaModel
from transload.model.native.ring import compiled_rings
from transload.model.remote_driver import RemoteDriver
from transload.model.source import ModelFiles
from transload.transfer.ffn_callers import HopReport
from transload.transfer.ffn_link import SlotSizes
from transload.transfer.ffn_meeting import FfnWeights, Party
from transload.transfer.listener import PeerAddress

SPARE_SLOTS = 2
"""Beside one for each micro-batch: for calls that were given up and are not answered yet."""


class TorchFfnSource:
    """The `FfnSource` of an executor."""

    def __init__(self, plan: WorkerPlan, files: ModelFiles, model: LlamaModel, executor: TorchExecutor) -> None:
        self._plan = plan
        self._files = files
        self._model = model
        self._executor = executor
        self._remote: RemoteDriver | None = None
        self._loaded: LocalDriver | None = None

    def open_remote(self, hop: HopPlan, me: Party, report: HopReport) -> None:
        if self._remote is not None:  # from a change that came to nothing
            assert self._executor.driver is not self._remote, "one set of FFN workers at a time"
            self._remote.close()
        arch, split = self._files.arch, hop.split
        row_bytes = arch.hidden_size * self._model.dtype.itemsize
        slots_per_row = arch.experts.per_token if arch.experts is not None else 1
        self._remote = RemoteDriver(
            weights=ffn_weights(self._plan, self._files),
            dtype=self._model.dtype,
            device=self._model.device,
            cutter=Cutter(arch, split.split, hop.num_workers),
            num_micro_batches=split.micro_batches,
            sizes=SlotSizes(
                num_slots=split.micro_batches + SPARE_SLOTS,
                call_bytes=hop.max_rows * (row_bytes + slots_per_row * INDEX_DTYPE.itemsize),
                answer_bytes=hop.max_rows * slots_per_row * row_bytes,
            ),
            client=FfnClientConfig(
                session=SessionId(int.from_bytes(os.urandom(8)) >> 1),
                fallback=split.fallback,
                timeout_seconds=split.timeout_seconds,
                deadline_seconds=split.deadline_seconds,
            ),
            me=me,
            load_pieces=lambda pieces: load_pieces(self._plan, self._files, pieces, _num_columns(hop)),
            report=report,
            spin_seconds=self._plan.spin_seconds,
            rings=compiled_rings(),
        )

    def connect(self, address: PeerAddress, transport: str) -> None:
        if self._remote is not None:
            self._remote.connect(address, transport)

    def disconnect(self, worker: WorkerId) -> None:
        if self._remote is not None:
            self._remote.disconnect(worker)

    def load(self) -> None:
        self._loaded = LocalDriver(load_feed_forwards(self._plan, self._files))
        give_back_memory()

    def switch(self, *, remote: bool) -> None:
        if remote:
            assert self._remote is not None, "opened before"
            self._executor.use_driver(self._remote)
            self._loaded = None
        else:
            assert self._loaded is not None, "loaded before"
            self._executor.use_driver(self._loaded)
            self._loaded = None
            if self._remote is not None:
                self._remote.close()
                self._remote = None
        give_back_memory()

    @property
    def is_loading(self) -> bool:
        remote = self._remote
        return remote is not None and remote.is_loading

    def counts(self) -> dict[str, float]:
        remote = self._remote
        if remote is None:
            return {}
        hop, client = remote.counts, remote.client.counts
        return {
            "hop_seconds": remote.hops.seconds,
            **{name: getattr(hop, name) for name in hop.__struct_fields__},
            **{name: getattr(client, name) for name in client.__struct_fields__},
            "workers": len(remote.client.workers),
            "holds_weights": float(remote.holds_weights),
        }

    def loads(self) -> tuple[tuple[int, ...], ...]:
        if self._files.arch.experts is None:
            return ()
        found = tuple(tuple(layer.num_chosen) for layer in self._model.attention.layers)
        return found if all(found) else ()

    def hops(self) -> tuple[int, ...]:
        return tuple(self._remote.hops.counts) if self._remote is not None else ()

    def close(self) -> None:
        if self._remote is not None:
            self._remote.close()
            self._remote = None


def _num_columns(hop: HopPlan) -> int:
    return hop.num_workers if hop.split.split == "column" else 1


def load_feed_forwards(
    plan: WorkerPlan, files: ModelFiles, part: int = 0, num_parts: int = 1
) -> list[FeedForwardLayer]:
    """The feed-forwards of every layer, or a column part of them. Loads no other weights."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    arch = files.arch
    tensors: Tensors = load_tensors(files, dtype, is_feed_forward)
    if num_parts > 1:
        arch, tensors = column_part(arch, tensors, part, num_parts)
    return build_feed_forwards(arch, tensors, dtype, plan.model.deterministic, torch.device(plan.device))


def build_side(plan: WorkerPlan, files: ModelFiles) -> FfnSide:
    """What an FFN worker computes with."""
    share = plan.share
    assert share is not None, f"{plan.name} is no FFN worker"
    pieces = pieces_of(share, files.arch)
    functions = load_pieces(plan, files, pieces, share.num_parts if share.split == "column" else 1)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    device = torch.device(plan.device)
    return FfnSide(functions, ffn_weights(plan, files), pieces, dtype, device, plan.threads)


def load_pieces(plan: WorkerPlan, files: ModelFiles, pieces: frozenset[Piece], num_columns: int) -> PieceFunctions:
    """These pieces of every layer, each a `num_columns`-th if it is no expert. Loads no other weights."""
    if files.arch.experts is not None:
        return _load_experts(plan, files, pieces)
    functions: dict[tuple[int, Piece], Callable[[torch.Tensor], torch.Tensor]] = {}
    for piece in pieces:
        for layer, feed_forward in enumerate(load_feed_forwards(plan, files, int(piece), num_columns)):
            functions[layer, piece] = feed_forward
    return functions


def _load_experts(plan: WorkerPlan, files: ModelFiles, pieces: frozenset[Piece]) -> PieceFunctions:
    dtype: torch.dtype = getattr(torch, plan.dtype)
    arch = files.arch
    stride = piece_stride(arch)

    def is_mine(name: str) -> bool:
        return is_feed_forward(name) and Piece(layer_of(name) * stride + (expert_of(name) or 0)) in pieces

    tensors = load_tensors(files, dtype, is_mine)
    return build_pieces(arch, tensors, dtype, plan.model.deterministic, torch.device(plan.device), pieces)


def ffn_weights(plan: WorkerPlan, files: ModelFiles) -> FfnWeights:
    """What both sides compare before the first call."""
    return FfnWeights(
        weights=files.identity,
        num_layers=files.arch.num_layers,
        hidden_size=files.arch.hidden_size,
        dtype=plan.dtype,
        deterministic=plan.model.deterministic,
    )
