"""Steps read from the logs of a server say the same as bare steps would."""

from __future__ import annotations

import pytest

from tests.study.calibrate.test_fit import machine_seconds, section
from transload.hardware.cost.measured import MeasuredStepCost
from transload.study.calibrate.effort import Effort
from transload.study.calibrate.fit import fit, shape_of
from transload.study.calibrate.probes import StepOrder
from transload.study.calibrate.served import USERS, measure_served
from transload.study.timeline import Step


class Server:
    """Prompts first, one after another while those before decode, then all together, each to its output."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._now = 0.0

    def ask(self, users: int, prompt: int, output: int) -> list[Step]:
        self.steps = []
        for number in range(users):
            self._step(prompt, [prompt + number - other for other in range(number)])
        for number in range(1, output):
            self._step(0, [prompt + number] * users)
        return self.steps

    def _step(self, prompt: int, contexts: list[int]) -> None:
        order = StepOrder(prefill=((0, prompt),) if prompt else (), decode=tuple(contexts))
        began, self._now = self._now, self._now + machine_seconds(order)
        self.steps.append(
            Step(
                worker="attention-0",
                start_seconds=began,
                end_seconds=self._now,
                num_prefill_tokens=prompt,
                num_decode=len(contexts),
                num_requests=len(contexts) + bool(prompt),
            )
        )


@pytest.mark.parametrize(
    "order",
    [
        StepOrder(prefill=((0, 100),)),
        StepOrder(decode=(150,) * 3),
        StepOrder(decode=(150,) * 12),
        StepOrder(prefill=((0, 100),), decode=(150,) * 6),
    ],
)
def test_what_a_server_was_seen_to_take_answers_what_it_would_take(order: StepOrder) -> None:
    times = measure_served(Server().ask, max_batch=64, effort=Effort(), say=lambda _line: None)
    found = fit(times)
    assert [point.requests for point in found.decode] == list(USERS)
    cost = MeasuredStepCost(
        section(
            prefill=found.prefill,
            prefill_context_seconds=found.prefill_context_seconds,
            decode=found.decode,
            mixed_share=found.mixed_share,
        )
    )
    assert cost.step_seconds(shape_of(order)) == pytest.approx(machine_seconds(order), rel=0.05)


def test_crowds_larger_than_a_batch_are_not_asked_for() -> None:
    asked: list[int] = []
    server = Server()

    def ask(users: int, prompt: int, output: int) -> list[Step]:
        asked.append(users)
        return server.ask(users, prompt, output)

    measure_served(ask, max_batch=4, effort=Effort(), say=lambda _line: None)
    assert max(asked) == 4
