"""A small virtual cluster that checks the invariants after every event, down to what lies in each KV cell."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from tests.invariants import check_bounds, check_links, check_ownership, check_quiescent
from tests.kv_contents import Contents
from transload.control.controller import ControllerConfig
from transload.control.engine import EngineConfig
from transload.control.messages import (
    Emitted,
    Finish,
    Message,
    Reject,
    Request,
    RequestId,
    Role,
    Sampling,
    Stream,
    WorkerId,
)
from transload.control.prefix import prompt_keys
from transload.runtime.cluster import FrameFault, StepFault, VirtualWorker, faithful, never_fails
from transload.runtime.cost import CostModel, LinearCost
from transload.runtime.shared_machine import MachineModel
from transload.runtime.virtual import CONTROLLER, VirtualRuntime

BLOCK_SIZE = 4
NUM_LAYERS = 4
NAMESPACE = b"tests"
MOST_EVENTS = 20_000
Check = Literal["changed", "everything"]
"""What is checked after each event: what hangs on the machine that has handled it, or all there is."""
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "a": "aggregated"}


def expected_token(request: Request, index: int) -> int:
    """What the virtual executor draws: a function of the prompt and the place alone, as greedy decoding is."""
    return 3 + (sum(request.prompt) * 31 + request.num_prompt_tokens * 7 + index) % 997


def make_request(
    number: int,
    prompt: list[int],
    max_tokens: int,
    deadline_seconds: float = 600.0,
    *,
    stops_at: int | None = None,
    min_tokens: int = 0,
) -> Request:
    """`stops_at`: the token at this place is a stop id."""
    request = Request(
        RequestId(number),
        len(prompt),
        max_tokens,
        Sampling(temperature=0.0, min_tokens=min_tokens),
        tuple(prompt),
        prompt_keys(NAMESPACE, prompt, BLOCK_SIZE),
        deadline_seconds,
    )
    if stops_at is None:
        return request
    stop_ids = (expected_token(request, stops_at),)
    sampling = Sampling(temperature=0.0, min_tokens=min_tokens, stop_ids=stop_ids)
    return msgspec.structs.replace(request, sampling=sampling)


def expected_end(request: Request) -> tuple[str, int]:
    """How the request ends if nothing is in its way, and after how many tokens."""
    for index in range(request.max_tokens):
        stops = expected_token(request, index) in request.sampling.stop_ids
        if stops and index + 1 >= request.sampling.min_tokens:
            return "stop", index + 1
    return "length", request.max_tokens


class World:
    """Workers are named by role and number: "p0 d0" is one prefill and one decode worker."""

    def __init__(
        self,
        workers: str = "p0 d0",
        *,
        num_blocks: int = 64,
        max_batch: int = 8,
        step_tokens: int = 16,
        layers_per_frame: int = 2,
        one_sided: bool = True,
        cost: CostModel | None = None,
        controller: ControllerConfig | None = None,
        frame_fault: FrameFault = faithful,
        step_fault: StepFault = never_fails,
        staged: bool = False,
        in_place: bool = False,
        most_windows: int | None = None,
        lease_seconds: Mapping[str, float] | None = None,
        check: Check = "changed",
        watch: Callable[[float, WorkerId, Message], None] | None = None,
        machine: MachineModel | None = None,
    ) -> None:
        self.events: list[tuple[float, WorkerId, Message]] = []
        self.tokens: dict[RequestId, list[int]] = defaultdict(list)
        self.finished: dict[RequestId, Finish] = {}
        self.rejected: dict[RequestId, Reject] = {}
        self.requests: dict[RequestId, Request] = {}
        self.struck: Counter[str] = Counter()
        """How often a schedule's faults have hit something."""
        self.contents = Contents(
            self.requests,
            expected_token,
            block_size=BLOCK_SIZE,
            num_layers=NUM_LAYERS,
            namespace=NAMESPACE,
            staged=staged,
        )
        self._emitted: set[tuple[RequestId, int, int]] = set()
        self._check = check
        self._last: WorkerId | None = None
        self._watch = watch
        specs = [
            VirtualWorker(
                engine=EngineConfig(
                    worker=WorkerId(name),
                    num_blocks=num_blocks,
                    block_size=BLOCK_SIZE,
                    num_layers=NUM_LAYERS,
                    cell_bytes=1024,
                    namespace=NAMESPACE,
                    max_batch=max_batch,
                    step_tokens=step_tokens,
                    lease_seconds=(lease_seconds or {}).get(name, 1.0),
                ),
                pool=ROLES[name[0]],
                role=ROLES[name[0]],
                layers_per_frame=layers_per_frame,
                one_sided=one_sided,
                in_place=in_place,
                most_windows=most_windows,
            )
            for name in workers.split()
        ]
        config = controller or ControllerConfig(local_prefill="fallback")
        self.runtime = VirtualRuntime(
            config,
            specs,
            cost or LinearCost(load_seconds=0.5),
            self,
            draw_token=expected_token,
            frame_fault=frame_fault,
            step_fault=step_fault,
            contents=self.contents,
            observe=self._observed,
            machine=machine,
        )

    def ask(
        self,
        at_seconds: float,
        prompt: list[int],
        max_tokens: int,
        deadline_seconds: float = 600.0,
        *,
        stops_at: int | None = None,
        min_tokens: int = 0,
    ) -> RequestId:
        number = len(self.requests) + 1
        request = make_request(number, prompt, max_tokens, deadline_seconds, stops_at=stops_at, min_tokens=min_tokens)
        self.requests[request.id] = request
        self.runtime.submit(at_seconds, request)
        return request.id

    def run(self, until: float = float("inf")) -> None:
        self.runtime.run(until=until)
        self.check_machines()

    def names(self, who: str) -> list[str]:
        """The types of the events one machine has handled, in order."""
        return [type(event).__name__ for _, target, event in self.events if target == who]

    # -- the sink ----------------------------------------------------------------------------------------------------

    def stream(self, command: Stream, times: Sequence[float]) -> None:
        token = command.token
        assert token.request not in self.finished, "a token after the end"
        assert token.index == len(self.tokens[token.request]), "tokens in order, without gap"
        request = self.requests[token.request]
        assert token.token == expected_token(request, token.index), "another request's token"
        controller = self.runtime.controller
        tracked = controller.requests.get(token.request) or controller.ended[token.request]
        assert token.epoch == tracked.epoch, "a token of an earlier attempt"
        self.tokens[token.request].append(token.token)

    def finish(self, command: Finish, now: float) -> None:
        assert command.request not in self.finished, "ended twice"
        assert command.num_outputs == len(self.tokens[command.request])
        self.finished[command.request] = command

    def reject(self, command: Reject, now: float) -> None:
        self.rejected[command.request] = command

    # -- invariants --------------------------------------------------------------------------------------------------

    def _observed(self, now: float, who: WorkerId, event: Message) -> None:
        self.events.append((now, who, event))
        assert len(self.events) < MOST_EVENTS, "it goes round in circles"
        if isinstance(event, Emitted):
            for token in event.tokens:
                name = token.request, token.epoch, token.index
                assert name not in self._emitted, "one attempt made one token twice"
                self._emitted.add(name)
        if self._watch is not None:
            self._watch(now, who, event)
        # what the event before has done; it can have changed the insides of one machine only
        self.check_machines(None if self._check == "everything" else self._last)
        self._last = who

    def check_machines(self, changed: WorkerId | None = None) -> None:
        """Every invariant; if it is named which machine has handled the event since all of them held, only those that
        hang on it. A test compares the two: they find the same mistakes at the same events."""
        runtime = self.runtime
        if changed != CONTROLLER:
            for name, worker in runtime.workers.items():
                if changed is None or name == changed:
                    worker.engine.check()
            self.contents.check(runtime.workers, runtime.links, changed)
            check_links(runtime, changed)
        check_ownership(runtime, changed)
        if changed is None or changed == CONTROLLER:
            check_bounds(runtime)

    def check_complete(self) -> None:
        """Everything asked has its full answer."""
        self.check_quiescent()
        for request in self.requests.values():
            reason, num_outputs = expected_end(request)
            assert self.finished[request.id].reason == reason, self.finished[request.id]
            assert len(self.tokens[request.id]) == num_outputs

    def check_quiescent(self) -> None:
        """Every admitted request has ended and nobody holds anything."""
        assert set(self.requests) == set(self.finished) | set(self.rejected)
        assert not set(self.finished) & set(self.rejected)
        check_quiescent(self.runtime)
        self.contents.check_prefixes(self.runtime.workers)
