"""What really lies in every worker's KV memory in a virtual run, position by position.

The keys and values of a position depend on the tokens up to it and on the layer. So each position of each cell here
remembers a number that stands for exactly that: (layer, all tokens so far). Steps write their own positions, frames
copy cells from worker to worker, torn and changed frames leave rubbish. Asserts whenever

- a step reads a position that does not hold its own request's tokens,
- a step writes into a block that somebody else may read or write, or changes under another's hands,
- cells change at the source while they are being sent,
- bytes land in blocks of another transfer, or in blocks that have been given away,
- a block that can be found by a prefix key does not hold that prefix.

Where a worker's steps work in a peer's blocks, those are read and written in the peer's memory, under the same rules.

A `staged` worker computes in the memory of a device, and its links read and write a copy of that on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transload.control.blocks import BlockPool
from transload.control.messages import Chunk, KvData, Request, RequestId, RunStep, SendFrame, TransferId, WorkerId
from transload.control.prefix import prompt_keys
from transload.runtime.cluster import Link, LiveWorker

NOTHING = 0
RUBBISH = -1
Cell = list[int]


class Window:
    """Blocks of a peer, or nobody's once it is closed."""

    def __init__(self, low: int, peer: WorkerId, memory: list[list[Cell]]) -> None:
        self.blocks = range(low, low + len(memory))
        self.peer: WorkerId | None = peer
        self.memory = memory


class Contents:
    """Implements `KvContents`. `expected(request, index)` is the output token at that place."""

    def __init__(
        self,
        requests: Mapping[RequestId, Request],
        expected: Callable[[Request, int], int],
        *,
        block_size: int,
        num_layers: int,
        namespace: bytes,
        staged: bool = False,
    ) -> None:
        self._staged = staged
        self._requests = requests
        self._expected = expected
        self._block_size = block_size
        self._num_layers = num_layers
        self._namespace = namespace
        self._memory: dict[WorkerId, list[list[Cell]]] = {}  # [block][layer][position], where steps compute
        self._host: dict[WorkerId, list[list[Cell]]] = {}  # where links read and write: the same if not staged
        self._windows: dict[WorkerId, list[Window]] = {}
        self._steps: dict[WorkerId, list[tuple[Chunk, tuple[int, ...]]]] = {}
        self._flights: dict[tuple[WorkerId, WorkerId], tuple[SendFrame, list[Cell]]] = {}
        self._copies: dict[int, tuple[SendFrame, list[Cell]]] = {}
        self._tokens: dict[RequestId, list[int]] = {}
        self._marks: dict[tuple[RequestId, int], list[int]] = {}
        self.num_reads = 0
        self.num_landings = 0

    # -- what a position should hold ----------------------------------------------------------------------------------

    def _all_tokens(self, request: Request) -> list[int]:
        tokens = self._tokens.get(request.id)
        if tokens is None:
            outputs = [self._expected(request, index) for index in range(request.max_tokens)]
            tokens = self._tokens[request.id] = [*request.prompt, *outputs]
        return tokens

    def marks(self, request: Request, layer: int) -> list[int]:
        """For each position of the request: what this layer holds there."""
        marks = self._marks.get((request.id, layer))
        if marks is None:
            marks, prefix = [], hash(self._namespace)
            for token in self._all_tokens(request):
                prefix = hash((prefix, token))
                marks.append(hash((layer, prefix)))
            self._marks[request.id, layer] = marks
        return marks

    # -- workers ------------------------------------------------------------------------------------------------------

    def worker_started(self, worker: WorkerId, num_blocks: int) -> None:
        self._memory[worker] = self._host[worker] = self._empty(num_blocks)
        if self._staged:
            self._host[worker] = self._empty(num_blocks)

    def window_opened(self, worker: WorkerId, window: int, peer: WorkerId) -> None:
        assert not self._staged
        self._windows.setdefault(worker, []).append(Window(window, peer, self._memory[peer]))

    def window_closed(self, worker: WorkerId, window: int) -> None:
        (found,) = [item for item in self._windows[worker] if item.blocks.start == window]
        found.peer, found.memory = None, self._empty(len(found.blocks))

    def _window_of(self, worker: WorkerId, block: int) -> Window | None:
        """None: it is a block of the worker's own."""
        if block < len(self._memory[worker]):
            return None
        (window,) = [item for item in self._windows[worker] if block in item.blocks]
        return window

    def _block(self, worker: WorkerId, block: int) -> list[Cell]:
        """Where a step of the worker finds a block."""
        window = self._window_of(worker, block)
        return self._memory[worker][block] if window is None else window.memory[block - window.blocks.start]

    def _is_torn(self, worker: WorkerId, blocks: Sequence[int]) -> bool:
        """Whether a peer's memory has gone under a step: what it draws is dropped, for its engine knows."""
        windows = [self._window_of(worker, block) for block in blocks]
        return any(window is not None and window.peer is None for window in windows)

    def _empty(self, num_blocks: int) -> list[list[Cell]]:
        return [[[NOTHING] * self._block_size for _ in range(self._num_layers)] for _ in range(num_blocks)]

    def worker_ended(self, worker: WorkerId) -> None:
        del self._memory[worker]
        del self._host[worker]
        self._steps.pop(worker, None)
        self._windows.pop(worker, None)

    # -- steps --------------------------------------------------------------------------------------------------------

    def step_started(self, worker: WorkerId, step: RunStep, *, fails: bool) -> None:
        assert worker not in self._steps, "two steps at once"
        if self._staged and not fails:
            for block in step.arrived:
                self._memory[worker][block] = [list(cell) for cell in self._host[worker][block]]
        chunks = [(chunk, tuple(chunk.blocks)) for chunk in step.chunks]
        self._steps[worker] = chunks
        for chunk, blocks in chunks:
            known = self._all_tokens(chunk.request)[: chunk.request.num_prompt_tokens + chunk.num_outputs]
            assert list(chunk.tokens) == known, "a step is given other tokens than the request has"
            assert chunk.start + chunk.num_tokens <= len(known)
            if not fails and not self._is_torn(worker, blocks):
                self._check_reads(worker, chunk, blocks, chunk.start)
        for chunk, blocks in chunks:
            self._write(worker, chunk, blocks, range(self._num_layers), rubbish=True)

    def layers_written(self, worker: WorkerId, step: RunStep, layer_lo: int, layer_hi: int) -> None:
        for chunk, blocks in self._steps[worker]:
            self._write(worker, chunk, blocks, range(layer_lo, layer_hi), rubbish=False)
            if self._staged and chunk.streams:
                end = -(-(chunk.start + chunk.num_tokens) // self._block_size)
                for block in blocks[chunk.num_sent_blocks : end]:
                    for layer in range(layer_lo, layer_hi):
                        self._host[worker][block][layer] = list(self._memory[worker][block][layer])

    def step_ended(self, worker: WorkerId, step: RunStep, *, fails: bool) -> None:
        for chunk, blocks in self._steps.pop(worker):
            assert tuple(chunk.blocks[: len(blocks)]) == blocks, "a request's blocks changed under a step"
            if not fails and not self._is_torn(worker, blocks):
                self._check_reads(worker, chunk, blocks, chunk.start)

    def _check_reads(self, worker: WorkerId, chunk: Chunk, blocks: Sequence[int], end: int) -> None:
        """Positions before `end` hold this request's own tokens, in every layer."""
        size = self._block_size
        self.num_reads += 1
        for layer in range(self._num_layers):
            marks = self.marks(chunk.request, layer)
            for index in range(-(-end // size)):
                low, high = index * size, min(end, (index + 1) * size)
                held = self._block(worker, blocks[index])[layer][: high - low]
                assert held == marks[low:high], (
                    f"{worker} reads block {blocks[index]} layer {layer} as positions {low}..{high} of request "
                    f"{chunk.request.id}: it holds something else"
                )

    def _write(
        self, worker: WorkerId, chunk: Chunk, blocks: Sequence[int], layers: Sequence[int], *, rubbish: bool
    ) -> None:
        size = self._block_size
        for layer in layers:
            marks = self.marks(chunk.request, layer)
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                cell = self._block(worker, blocks[position // size])[layer]
                cell[position % size] = RUBBISH if rubbish else marks[position]

    # -- frames -------------------------------------------------------------------------------------------------------

    def send_started(self, source: WorkerId, send: SendFrame) -> None:
        assert (source, send.peer) not in self._flights
        self._flights[source, send.peer] = send, self._read(source, send)

    def send_ended(self, source: WorkerId, send: SendFrame) -> None:
        sent, cells = self._flights.pop((source, send.peer))
        assert sent is send
        assert self._read(source, send) == cells, f"{source} changed cells while they were being sent"
        self._copies[id(send)] = send, cells

    def landed(self, source: WorkerId, send: SendFrame, *, intact: bool) -> None:
        _, cells = self._copies[id(send)]
        memory = self._host[send.peer]
        self.num_landings += 1
        for (layer, place), cell in zip(self._places(send), cells, strict=True):
            memory[send.target_blocks[place]][layer][:] = cell if intact else [RUBBISH] * self._block_size

    def _read(self, source: WorkerId, send: SendFrame) -> list[Cell]:
        memory = self._host[source]
        assert isinstance(send.frame, KvData)
        assert not send.frame.in_place
        return [list(memory[send.source_blocks[place]][layer]) for layer, place in self._places(send)]

    @staticmethod
    def _places(send: SendFrame) -> list[tuple[int, int]]:
        frame = send.frame
        assert isinstance(frame, KvData)
        places = range(frame.block_hi - frame.block_lo)
        return [(layer, place) for layer in range(frame.layer_lo, frame.layer_hi) for place in places]

    # -- who may touch what, after any event --------------------------------------------------------------------------

    def check(self, workers: Mapping[WorkerId, LiveWorker], links: Mapping[tuple[WorkerId, WorkerId], Link]) -> None:
        """No block has two writers, and none that is being read or written is anybody else's to take."""
        for name, worker in workers.items():
            pool, writers = worker.engine.pool, list[int]()
            for chunk, blocks in self._steps.get(name, ()):
                first, last = chunk.start // self._block_size, (chunk.start + chunk.num_tokens - 1) // self._block_size
                if any(self._window_of(name, block) is not None for block in blocks):
                    self._check_in_place(workers, name, blocks, first, last)
                    continue
                assert all(pool._references[block] for block in blocks), f"{name} gave away blocks of a running step"
                writers += blocks[first : last + 1]
                for block in blocks[first : last + 1]:
                    assert pool._references[block] == 1, f"{name} writes into block {block}, which is shared"
                    assert pool._keys[block] is None, f"{name} writes into block {block}, which others can find"
            for (transfer, _), permission in worker.permissions.items():
                writers += permission.blocks
                self._check_kept(pool, permission.blocks, transfer)
            assert len(writers) == len(set(writers)), f"{name}: a block has two writers"
        for (source, target), link in links.items():
            for send in (*link.queue, *([link.current] if link.current is not None else ())):
                self._check_send(workers[source], workers[target], send)

    def _check_in_place(
        self, workers: Mapping[WorkerId, LiveWorker], name: WorkerId, blocks: Sequence[int], first: int, last: int
    ) -> None:
        """A step that works in a peer's blocks writes only what is granted to it or kept aside for it, and reads only
        what the peer still holds for it."""
        for place, block in enumerate(blocks):
            window = self._window_of(name, block)
            assert window is not None, "a request's blocks are here and there"
            if window.peer is None:
                continue
            target, own = workers[window.peer], block - window.blocks.start
            exchange, pool = target.engine.exchange, target.engine.pool
            held = pool._references[own] or any(own in kept for kept in pool._quarantined.values())
            assert held, f"{window.peer} gave away block {own}, which a step of {name} reads"
            if first <= place <= last:
                granted = [kv.blocks for kv in target.permissions.values() if kv.source == name]
                aside = [
                    pool._quarantined[transfer]
                    for transfer, (source, _) in exchange._quarantined.items()
                    if source == name
                ]
                mine = [kept for kept in (*granted, *aside) if own in kept]
                assert len(mine) == 1, f"{name} writes into block {own} of {window.peer}, which is not granted to it"
                assert pool._keys[own] is None, f"{name} writes into block {own}, which others can find"

    def _check_send(self, source: LiveWorker, target: LiveWorker, send: SendFrame) -> None:
        if not isinstance(send.frame, KvData):
            return
        references = source.engine.pool._references
        assert bool(send.source_blocks) != send.frame.in_place
        assert all(references[block] for block in send.source_blocks), "blocks are given away that are still sent"
        if target.spec.one_sided:
            self._check_kept(target.engine.pool, send.target_blocks, send.frame.transfer)

    @staticmethod
    def _check_kept(pool: BlockPool, blocks: Sequence[int], transfer: TransferId) -> None:
        kept = pool._quarantined.get(transfer, ())
        assert all(pool._references[block] == 1 or block in kept for block in blocks), "a block may still be written"

    def check_prefixes(self, workers: Mapping[WorkerId, LiveWorker]) -> None:
        """Every block that can be found by a key holds what the key names."""
        named: dict[bytes, tuple[Request, int]] = {}
        for request in self._requests.values():
            keys = prompt_keys(self._namespace, self._all_tokens(request), self._block_size)
            named.update({key: (request, index) for index, key in enumerate(keys)})
        for name, worker in workers.items():
            for key, block in worker.engine.pool._by_key.items():
                request, index = named[key]
                span = slice(index * self._block_size, (index + 1) * self._block_size)
                for layer in range(self._num_layers):
                    memory = self._host if block in worker.engine._arrived else self._memory  # will be taken in first
                    held = memory[name][block][layer]
                    assert held == self.marks(request, layer)[span], f"{name}: block {block} is not what its key says"
