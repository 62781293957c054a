"""What really lies in every worker's KV memory in a virtual run, position by position.

The keys and values of a position depend on the tokens up to it and on the layer. So each position of each cell here
remembers a number that stands for exactly that: (layer, all tokens so far). Steps write their own positions, frames
copy cells from worker to worker, torn and changed frames leave rubbish. A worker's memory is one flat list: block by
block, in it position by position, for each the layers one after the other, so that what a step reads of a block is one
slice. Asserts whenever

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
Memory = list[int]
Cell = list[int]


class Window:
    """Blocks of a peer, or nobody's once it is closed."""

    def __init__(self, low: int, num_blocks: int, peer: WorkerId, memory: Memory) -> None:
        self.blocks = range(low, low + num_blocks)
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
        self._block_cells = block_size * num_layers
        self._memory: dict[WorkerId, Memory] = {}  # where steps compute
        self._host: dict[WorkerId, Memory] = {}  # where links read and write: the same if not staged
        self._windows: dict[WorkerId, list[Window]] = {}
        self._steps: dict[WorkerId, list[tuple[Chunk, tuple[int, ...]]]] = {}
        self._flights: dict[tuple[WorkerId, WorkerId], tuple[SendFrame, list[Cell]]] = {}
        self._copies: dict[int, tuple[SendFrame, list[Cell]]] = {}
        self._tokens: dict[RequestId, list[int]] = {}
        self._marks: dict[RequestId, list[int]] = {}
        self.num_reads = 0
        self.num_landings = 0

    # -- what a position should hold ----------------------------------------------------------------------------------

    def _all_tokens(self, request: Request) -> list[int]:
        tokens = self._tokens.get(request.id)
        if tokens is None:
            outputs = [self._expected(request, index) for index in range(request.max_tokens)]
            tokens = self._tokens[request.id] = [*request.prompt, *outputs]
        return tokens

    def marks(self, request: Request) -> list[int]:
        """What each position of the request holds, for each the layers one after the other."""
        marks = self._marks.get(request.id)
        if marks is None:
            marks, prefix, num_layers = [], hash(self._namespace), self._num_layers
            for token in self._all_tokens(request):
                prefix = hash((prefix, token))
                marks += range(prefix * num_layers, (prefix + 1) * num_layers)
            self._marks[request.id] = marks
        return marks

    # -- workers ------------------------------------------------------------------------------------------------------

    def worker_started(self, worker: WorkerId, num_blocks: int) -> None:
        self._memory[worker] = self._host[worker] = self._empty(num_blocks)
        if self._staged:
            self._host[worker] = self._empty(num_blocks)

    def window_opened(self, worker: WorkerId, window: int, peer: WorkerId) -> None:
        assert not self._staged
        memory = self._memory[peer]
        opened = Window(window, len(memory) // self._block_cells, peer, memory)
        self._windows.setdefault(worker, []).append(opened)

    def window_closed(self, worker: WorkerId, window: int) -> None:
        (found,) = [item for item in self._windows[worker] if item.blocks.start == window]
        found.peer, found.memory = None, self._empty(len(found.blocks))

    def _window_of(self, worker: WorkerId, block: int) -> Window | None:
        """None: it is a block of the worker's own."""
        if block * self._block_cells < len(self._memory[worker]):
            return None
        (window,) = [item for item in self._windows[worker] if block in item.blocks]
        return window

    def _place(self, worker: WorkerId, block: int) -> tuple[Memory, int]:
        """Where a step of the worker finds a block: in which memory, and where in it the block begins."""
        window = self._window_of(worker, block)
        if window is None:
            return self._memory[worker], block * self._block_cells
        return window.memory, (block - window.blocks.start) * self._block_cells

    def _is_torn(self, worker: WorkerId, blocks: Sequence[int]) -> bool:
        """Whether a peer's memory has gone under a step: what it draws is dropped, for its engine knows."""
        if worker not in self._windows:
            return False
        windows = [self._window_of(worker, block) for block in blocks]
        return any(window is not None and window.peer is None for window in windows)

    def _empty(self, num_blocks: int) -> Memory:
        return [NOTHING] * (num_blocks * self._block_cells)

    def worker_ended(self, worker: WorkerId) -> None:
        del self._memory[worker]
        del self._host[worker]
        self._steps.pop(worker, None)
        self._windows.pop(worker, None)

    # -- steps --------------------------------------------------------------------------------------------------------

    def step_started(self, worker: WorkerId, step: RunStep, *, fails: bool) -> None:
        assert worker not in self._steps, "two steps at once"
        if self._staged and not fails:
            memory, host, span = self._memory[worker], self._host[worker], self._block_cells
            for block in step.arrived:
                memory[block * span : (block + 1) * span] = host[block * span : (block + 1) * span]
        chunks = [(chunk, tuple(chunk.blocks)) for chunk in step.chunks]
        self._steps[worker] = chunks
        for chunk, blocks in chunks:
            known = self._all_tokens(chunk.request)[: chunk.request.num_prompt_tokens + chunk.num_outputs]
            assert list(chunk.tokens) == known, "a step is given other tokens than the request has"
            assert chunk.start + chunk.num_tokens <= len(known)
            if not fails and not self._is_torn(worker, blocks):
                self._check_reads(worker, chunk, blocks)
        for chunk, blocks in chunks:
            self._write(worker, chunk, blocks, 0, self._num_layers, rubbish=True)

    def layers_written(self, worker: WorkerId, step: RunStep, layer_lo: int, layer_hi: int) -> None:
        for chunk, blocks in self._steps[worker]:
            self._write(worker, chunk, blocks, layer_lo, layer_hi, rubbish=False)
            if self._staged and chunk.streams:
                end = -(-(chunk.start + chunk.num_tokens) // self._block_size)
                memory, host = self._memory[worker], self._host[worker]
                for block in blocks[chunk.num_sent_blocks : end]:
                    for layer in range(layer_lo, layer_hi):
                        place = self._cell(block, layer)
                        host[place] = memory[place]

    def step_ended(self, worker: WorkerId, step: RunStep, *, fails: bool) -> None:
        for chunk, blocks in self._steps.pop(worker):
            assert tuple(chunk.blocks[: len(blocks)]) == blocks, "a request's blocks changed under a step"
            if not fails and not self._is_torn(worker, blocks):
                self._check_reads(worker, chunk, blocks)

    def _check_reads(self, worker: WorkerId, chunk: Chunk, blocks: Sequence[int]) -> None:
        """Positions before the chunk hold this request's own tokens, in every layer."""
        marks, span = self.marks(chunk.request), self._block_cells
        self.num_reads += 1
        end = chunk.start * self._num_layers
        for index, low in enumerate(range(0, end, span)):
            memory, held_from = self._place(worker, blocks[index])
            length = min(span, end - low)
            assert memory[held_from : held_from + length] == marks[low : low + length], (
                f"{worker} reads block {blocks[index]} from position {index * self._block_size} on of request "
                f"{chunk.request.id}: it holds something else"
            )

    def _write(
        self, worker: WorkerId, chunk: Chunk, blocks: Sequence[int], layer_lo: int, layer_hi: int, *, rubbish: bool
    ) -> None:
        """The chunk's own positions, in these layers, a block at a time."""
        size, num_layers = self._block_size, self._num_layers
        marks, end = self.marks(chunk.request), chunk.start + chunk.num_tokens
        whole = layer_hi - layer_lo == num_layers
        position = chunk.start
        while position < end:
            count = min(size - position % size, end - position)
            memory, at = self._place(worker, blocks[position // size])
            at += position % size * num_layers
            for layer in (0,) if whole else range(layer_lo, layer_hi):
                stride = 1 if whole else num_layers
                low, high = position * num_layers + layer, (position + count) * num_layers
                new = marks[low:high:stride]
                memory[at + layer : at + count * num_layers : stride] = [RUBBISH] * len(new) if rubbish else new
            position += count

    def _cell(self, block: int, layer: int) -> slice:
        """Where one layer of a block lies."""
        return slice(block * self._block_cells + layer, (block + 1) * self._block_cells, self._num_layers)

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
            memory[self._cell(send.target_blocks[place], layer)] = cell if intact else [RUBBISH] * self._block_size

    def _read(self, source: WorkerId, send: SendFrame) -> list[Cell]:
        memory = self._host[source]
        assert isinstance(send.frame, KvData)
        assert not send.frame.in_place
        return [memory[self._cell(send.source_blocks[place], layer)] for layer, place in self._places(send)]

    @staticmethod
    def _places(send: SendFrame) -> list[tuple[int, int]]:
        frame = send.frame
        assert isinstance(frame, KvData)
        places = range(frame.block_hi - frame.block_lo)
        return [(layer, place) for layer in range(frame.layer_lo, frame.layer_hi) for place in places]

    # -- who may touch what, after any event --------------------------------------------------------------------------

    def check(
        self,
        workers: Mapping[WorkerId, LiveWorker],
        links: Mapping[tuple[WorkerId, WorkerId], Link],
        changed: WorkerId | None = None,
    ) -> None:
        """No block has two writers, and none that is being read or written is anybody else's to take. Everywhere, or as
        far as it hangs on one worker: only what that does takes blocks, steps, permissions or frames on. On it hang its
        own steps, and those of others in its blocks."""
        for name, worker in workers.items():
            if changed is None or name == changed or self._works_there(name, changed):
                self._check_writers(workers, name, worker)
        for pair, link in links.items():
            if (changed is None or changed in pair) and (link.queue or link.current is not None):
                source, target = workers[pair[0]], workers[pair[1]]
                for send in (*link.queue, *([link.current] if link.current is not None else ())):
                    self._check_send(source, target, send)

    def _works_there(self, worker: WorkerId, peer: WorkerId) -> bool:
        """Whether a step of the worker may be in the peer's blocks."""
        return worker in self._steps and any(window.peer == peer for window in self._windows.get(worker, ()))

    def _check_writers(self, workers: Mapping[WorkerId, LiveWorker], name: WorkerId, worker: LiveWorker) -> None:
        pool, writers = worker.engine.pool, list[int]()
        references = pool._references
        for chunk, blocks in self._steps.get(name, ()):
            first, last = chunk.start // self._block_size, (chunk.start + chunk.num_tokens - 1) // self._block_size
            if name in self._windows and any(self._window_of(name, block) is not None for block in blocks):
                self._check_in_place(workers, name, blocks, first, last)
                continue
            assert all(map(references.__getitem__, blocks)), f"{name} gave away blocks of a running step"
            own = blocks[first : last + 1]
            writers += own
            for block in own:
                assert references[block] == 1, f"{name} writes into block {block}, which is shared"
                assert pool._keys[block] is None, f"{name} writes into block {block}, which others can find"
        for (transfer, _), permission in worker.permissions.items():
            writers += permission.blocks
            self._check_kept(pool, permission.blocks, transfer)
        assert len(writers) == len(set(writers)), f"{name}: a block has two writers"

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
        assert all(map(references.__getitem__, send.source_blocks)), "blocks are given away that are still sent"
        if target.spec.one_sided:
            self._check_kept(target.engine.pool, send.target_blocks, send.frame.transfer)

    @staticmethod
    def _check_kept(pool: BlockPool, blocks: Sequence[int], transfer: TransferId) -> None:
        kept, references = pool._quarantined.get(transfer, ()), pool._references
        for block in blocks:
            assert references[block] == 1 or block in kept, "a block may still be written"

    def check_prefixes(self, workers: Mapping[WorkerId, LiveWorker]) -> None:
        """Every block that can be found by a key holds what the key names."""
        named: dict[bytes, tuple[Request, int]] = {}
        for request in self._requests.values():
            keys = prompt_keys(self._namespace, self._all_tokens(request), self._block_size)
            named.update({key: (request, index) for index, key in enumerate(keys)})
        span = self._block_cells
        for name, worker in workers.items():
            for key, block in worker.engine.pool._by_key.items():
                request, index = named[key]
                memory = self._host if block in worker.engine._arrived else self._memory  # will be taken in first
                held = memory[name][block * span : (block + 1) * span]
                marks = self.marks(request)[index * span : (index + 1) * span]
                assert held == marks, f"{name}: block {block} is not what its key says"
