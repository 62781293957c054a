"""A small virtual cluster that checks the invariants after every event."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from transload.control.controller import ControllerConfig
from transload.control.engine import EngineConfig
from transload.control.messages import (
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
from transload.runtime.virtual import FrameFault, LinearCost, VirtualRuntime, VirtualWorker, faithful

BLOCK_SIZE = 4
NUM_LAYERS = 4
NAMESPACE = b"tests"
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "a": "aggregated"}


def expected_token(request: Request, index: int) -> int:
    """What the virtual executor draws: a function of the prompt and the place alone, as greedy decoding is."""
    return 3 + (sum(request.prompt) * 31 + request.num_prompt_tokens * 7 + index) % 997


def make_request(number: int, prompt: list[int], max_tokens: int, deadline_seconds: float = 600.0) -> Request:
    return Request(
        RequestId(number),
        len(prompt),
        max_tokens,
        Sampling(temperature=0.0, stop_ids=(2,)),
        tuple(prompt),
        prompt_keys(NAMESPACE, prompt, BLOCK_SIZE),
        deadline_seconds,
    )


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
        cost: LinearCost | None = None,
        controller: ControllerConfig | None = None,
        frame_fault: FrameFault = faithful,
        check: bool = True,
        watch: Callable[[float, WorkerId, Message], None] | None = None,
    ) -> None:
        self.events: list[tuple[float, WorkerId, Message]] = []
        self.tokens: dict[RequestId, list[int]] = defaultdict(list)
        self.finished: dict[RequestId, Finish] = {}
        self.rejected: dict[RequestId, Reject] = {}
        self.requests: dict[RequestId, Request] = {}
        self._check = check
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
                    lease_seconds=1.0,
                ),
                pool=ROLES[name[0]],
                role=ROLES[name[0]],
                layers_per_frame=layers_per_frame,
                one_sided=one_sided,
            )
            for name in workers.split()
        ]
        config = controller or ControllerConfig(max_batch=max_batch, local_prefill="fallback")
        self.runtime = VirtualRuntime(
            config,
            specs,
            cost or LinearCost(load_seconds=0.5),
            self,
            draw_token=expected_token,
            frame_fault=frame_fault,
            observe=self._observed,
        )

    def ask(self, at_seconds: float, prompt: list[int], max_tokens: int, deadline_seconds: float = 600.0) -> RequestId:
        request = make_request(len(self.requests) + 1, prompt, max_tokens, deadline_seconds)
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

    def stream(self, command: Stream, now: float) -> None:
        token = command.token
        assert token.request not in self.finished, "a token after the end"
        assert token.index == len(self.tokens[token.request]), "tokens in order, without gap"
        request = self.requests[token.request]
        assert token.token == expected_token(request, token.index), "another request's token"
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
        if self._watch is not None:
            self._watch(now, who, event)
        if self._check:
            self.check_machines()

    def check_machines(self) -> None:
        for worker in self.runtime.workers.values():
            worker.engine.check()

    def check_complete(self) -> None:
        """Everything asked has its full answer."""
        self.check_quiescent()
        for request in self.requests.values():
            assert self.finished[request.id].reason == "length", self.finished[request.id]
            assert len(self.tokens[request.id]) == request.max_tokens

    def check_quiescent(self) -> None:
        """Every admitted request has ended and nobody holds anything."""
        assert set(self.requests) == set(self.finished) | set(self.rejected)
        controller = self.runtime.controller
        assert not controller.requests
        assert controller.num_waiting == 0
        for view in controller.views.values():
            assert not view.committed_blocks
            assert not view.prefill_tokens
        for name, worker in self.runtime.workers.items():
            assert worker.engine.is_idle, f"{name} still holds something"
