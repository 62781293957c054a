"""A step of the attention/FFN split as the shipped machines play it: the closed form without losses, and what becomes
of it when an FFN worker dies in the middle."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from transload.hardware.afd.events import play
from transload.hardware.afd.pipeline import Hop, LayerTimes, Pipeline, report, step_seconds
from transload.runtime.ffn_step import FfnRules, Outage, play_step

PATIENT = FfnRules(timeout_seconds=1e6, deadline_seconds=1e7, max_wait_seconds=1e3)
LAYERS = 10
HOP = Hop(latency_seconds=0.1)
LOCAL = msgspec.structs.replace(PATIENT, local_seconds=1.5, load_seconds=20.0)


def pipeline(attention_workers: int = 1, ffn_workers: int = 1, **changes: object) -> Pipeline:
    layer = LayerTimes(attention_seconds=1.0, ffn_seconds=0.8, out=HOP, back=HOP, count=LAYERS)
    made = Pipeline(layers=(layer,), attention_workers=attention_workers, ffn_workers=ffn_workers, tail_seconds=0.5)
    return msgspec.structs.replace(made, **changes)


def drawn(random: Random) -> Pipeline:
    """Ratios, splits and links of all kinds, as many layers as models have."""

    def hop() -> Hop:
        return Hop(
            latency_seconds=random.choice((0.0, random.random())),
            attention_port_seconds=random.choice((0.0, random.random() / 2)),
            ffn_port_seconds=random.choice((0.0, random.random() * 0.3)),
        )

    layer = LayerTimes(
        attention_seconds=0.05 + random.random(), ffn_seconds=0.05 + random.random(), out=hop(), back=hop(), count=40
    )
    attention_workers, ffn_workers = random.choice([(1, 1), (2, 1), (3, 1), (6, 1), (2, 2), (4, 2), (1, 2), (2, 4)])
    return Pipeline(
        layers=(layer,),
        micro_batches=random.randint(1, 4),
        attention_workers=attention_workers,
        ffn_workers=ffn_workers,
        split=random.choice(("replica", "column")),
        tail_seconds=random.random(),
    )


@pytest.mark.parametrize("seed", range(40))
def test_without_losses_it_is_the_closed_form(seed: int) -> None:
    """Within 2 %; where the FFN side is the busiest the machines also merge micro-batches that wait there at the same
    time, which the closed form does not, and are up to a quarter faster."""
    shape = drawn(Random(seed))
    played = play_step(shape, PATIENT)
    said = step_seconds(shape)
    assert played.problems == (None,) * shape.attention_workers
    assert max(played.seconds) < 1.02 * said
    assert max(played.seconds) > (0.75 if report(shape).bound == "ffn" else 0.98) * said


def test_everybody_finds_into_step_and_calls_are_merged() -> None:
    shape = pipeline(attention_workers=4)
    played = play_step(shape, msgspec.structs.replace(PATIENT, max_wait_seconds=0.05))
    assert played.num_batches == play(shape).num_calls == LAYERS * 2
    assert max(played.seconds) == pytest.approx(step_seconds(shape), rel=0.02)


@pytest.mark.parametrize("at", [0.0, 0.3, 4.05, 11.0, 19.9])
def test_another_worker_takes_over_whenever_one_dies(at: float) -> None:
    shape = pipeline(attention_workers=2, ffn_workers=2)
    whole = step_seconds(shape)
    played = play_step(shape, PATIENT, outages=[Outage(0, at)])
    assert played.problems == (None, None)
    assert played.num_computed_here == 0
    assert whole - 1e-9 <= played.seconds[0] < whole + (LAYERS + 2) * 0.8 * 2
    if 0.0 < at < 15.0:
        assert played.num_retries > 0 or played.seconds[0] > whole


def test_a_spare_stands_in_for_the_only_worker() -> None:
    shape = pipeline()
    played = play_step(shape, PATIENT, outages=[Outage(0, 5.0)], spares=1)
    assert played.problems == (None,)
    assert played.seconds[0] < step_seconds(shape) + 2 * 0.8 + 0.4
    assert played.num_retries > 0


def test_the_last_one_gone_is_made_good_by_the_attention_worker() -> None:
    """It loads the weights once, and does both halves of each layer from then on."""
    shape = pipeline()
    played = play_step(shape, LOCAL, outages=[Outage(0, 0.0)])
    assert played.problems == (None,)
    assert played.has_loaded == (True,)
    assert played.num_computed_here == 2 * LAYERS
    assert played.seconds[0] == pytest.approx(20.0 + LAYERS * 2 * (1.0 + 1.5) + 0.5)
    again = play_step(shape, LOCAL, outages=[Outage(0, 0.0)], has_weights=True)
    assert again.seconds[0] == pytest.approx(played.seconds[0] - 20.0)


def test_without_room_for_the_weights_the_step_fails_and_says_so() -> None:
    played = play_step(pipeline(), PATIENT, outages=[Outage(0, 3.0)])
    assert played.seconds[0] < 6.0
    assert played.problems[0] is not None
    assert "cannot hold the weights" in played.problems[0]


def test_with_no_fallback_it_waits_for_the_deadline_or_for_the_worker() -> None:
    rules = msgspec.structs.replace(PATIENT, fallback="error", deadline_seconds=7.0)
    failed = play_step(pipeline(), rules, outages=[Outage(0, 3.0)])
    assert failed.problems[0] is not None
    assert "7 s" in failed.problems[0]
    assert 7.0 < failed.seconds[0] < 3.0 + 7.0 + 1.0
    back = play_step(pipeline(), rules, outages=[Outage(0, 3.0, 6.5)])
    assert back.problems == (None,)
    assert back.seconds[0] == pytest.approx(step_seconds(pipeline()) + 3.5, abs=1.5)


def test_a_part_of_every_layer_that_is_lost_is_computed_here_and_the_rest_there() -> None:
    shape = pipeline(ffn_workers=4, split="column")
    whole = play_step(shape, LOCAL, has_weights=True)
    played = play_step(shape, LOCAL, outages=[Outage(2, 0.0)], has_weights=True)
    assert played.problems == (None,)
    assert played.num_computed_here == 2 * LAYERS
    assert whole.seconds[0] < played.seconds[0] <= whole.seconds[0] + 2 * LAYERS * 1.5 / 4 + 1.5


def test_a_slow_worker_is_not_waited_for_where_there_is_another() -> None:
    """A call that is late is asked of the other as well, and whoever answers first is taken."""
    rules = msgspec.structs.replace(PATIENT, timeout_seconds=2.0)
    shape = pipeline(ffn_workers=2)
    slow = play_step(shape, rules, batch_seconds=lambda server, _: 0.8 if server else 50.0)
    assert slow.num_retries > 0
    assert slow.seconds[0] < 60.0


def test_the_same_step_twice_is_the_same() -> None:
    shape = pipeline(attention_workers=3, ffn_workers=2)
    first, second = (play_step(shape, LOCAL, outages=[Outage(1, 4.0, 9.0)]) for _ in range(2))
    assert first == second
