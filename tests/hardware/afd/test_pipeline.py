"""The closed form of the attention/FFN pipeline against the same pipeline played event by event, and what it says."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transload.hardware.afd.events import play
from transload.hardware.afd.pipeline import (
    Hop,
    LayerTimes,
    Pipeline,
    Split,
    report,
    step_curve,
    step_seconds,
    without_hops,
)

RATIOS = [(1, 1), (2, 1), (3, 1), (6, 1), (3, 2), (7, 4), (1, 2), (1, 3), (2, 4), (1, 6)]


def times(low: float = 0.0, high: float = 1.0) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda seconds: round(seconds, 4))


@st.composite
def hops(draw: st.DrawFn, spine: bool) -> Hop:
    return Hop(
        latency_seconds=draw(st.one_of(st.just(0.0), times())),
        attention_port_seconds=draw(st.one_of(st.just(0.0), times(high=0.5))),
        ffn_port_seconds=draw(st.one_of(st.just(0.0), times(high=0.3))),
        shared_seconds=draw(st.one_of(st.just(0.0), times(high=0.1))) if spine else 0.0,
    )


@st.composite
def pipelines(draw: st.DrawFn, splits: tuple[Split, ...] = ("replica", "column", "expert")) -> Pipeline:
    split = draw(st.sampled_from(splits))
    # Messages in parts over one spine: see the test of its own.
    out, back = draw(hops(spine=split == "replica")), draw(hops(spine=split == "replica"))
    runs = draw(st.integers(1, 2))
    layers = tuple(
        LayerTimes(
            attention_seconds=draw(times(0.05)),
            ffn_seconds=draw(times(0.05)),
            out=out,
            back=back,
            count=draw(st.integers(20, 30)),
        )
        for _ in range(runs)
    )
    attention_workers, ffn_workers = draw(st.sampled_from(RATIOS))
    return Pipeline(
        layers=layers,
        micro_batches=draw(st.integers(1, 4)),
        attention_workers=attention_workers,
        ffn_workers=ffn_workers,
        split=split,
        tail_seconds=draw(times()),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pipelines())
def test_closed_form_and_events_agree_within_two_percent(pipeline: Pipeline) -> None:
    assert step_seconds(pipeline) == pytest.approx(play(pipeline).step_seconds, rel=0.02)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pipelines(("column",)), times(high=0.1), times(high=0.1))
def test_parts_of_calls_that_share_a_spine_are_told_roughly(pipeline: Pipeline, out: float, back: float) -> None:
    """Which part goes first over the spine depends on who was first; the closed form takes the mean."""
    layers = tuple(
        msgspec.structs.replace(
            layer,
            out=msgspec.structs.replace(layer.out, shared_seconds=out),
            back=msgspec.structs.replace(layer.back, shared_seconds=back),
        )
        for layer in pipeline.layers
    )
    pipeline = msgspec.structs.replace(pipeline, layers=layers)
    assert step_seconds(pipeline) == pytest.approx(play(pipeline).step_seconds, rel=0.15)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pipelines(), times())
def test_a_step_curve_is_the_closed_form_at_any_attention(pipeline: Pipeline, attention: float) -> None:
    curve = step_curve(pipeline)
    if curve is None:
        assert not pipeline.is_even
        return
    layer = msgspec.structs.replace(pipeline.layers[0], attention_seconds=attention)
    changed = msgspec.structs.replace(pipeline, layers=(layer,))
    assert curve.step_seconds(attention) == pytest.approx(step_seconds(changed), rel=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pipelines())
def test_busy_shares_agree_with_the_events(pipeline: Pipeline) -> None:
    even = (
        pipeline.split != "replica"
        or max(pipeline.attention_workers, pipeline.ffn_workers) % min(pipeline.attention_workers, pipeline.ffn_workers)
        == 0
    )
    said, played = report(pipeline), play(pipeline)
    assert said.attention_busy == pytest.approx(played.attention_busy, rel=0.03)
    if even and pipeline.micro_batches % pipeline.replicas == 0:
        assert said.ffn_busy == pytest.approx(played.ffn_busy, rel=0.03)
    assert 0.0 <= said.attention_bubble < 1.0
    assert 0.0 <= said.exposed_share < 1.0


def one(attention: float, ffn: float, latency: float = 0.0, **kwargs: object) -> Pipeline:
    hop = Hop(latency_seconds=latency)
    layer = LayerTimes(attention_seconds=attention, ffn_seconds=ffn, out=hop, back=hop, count=10)
    return msgspec.convert({"layers": [msgspec.to_builtins(layer)], **kwargs}, Pipeline)


def test_one_micro_batch_is_serial() -> None:
    assert step_seconds(one(2.0, 3.0, 0.5, micro_batches=1)) == pytest.approx(10 * (2 + 3 + 1))


def test_two_micro_batches_hide_the_shorter_side_and_the_hops() -> None:
    # Nine further layers at 2 x 3 seconds, the first one's round trip, and the second micro-batch behind the first.
    said = report(one(3.0, 2.0, 0.5, micro_batches=2))
    assert said.step_seconds == pytest.approx(9 * 6 + 6 + 3)
    assert said.bound == "attention"
    assert said.exposed_hop_seconds == pytest.approx(1.0)
    assert said.attention_bubble == pytest.approx(1 - 60 / 63)


def test_it_is_the_formula_of_megascale_where_its_conditions_hold() -> None:
    """T = (T_a + T_e + 2 T_c) + T_f (m L - 1) for T_a = T_e = T_f and m T_f >= 2 (T_f + T_c) (arXiv 2504.02263)."""
    for m, crossing in ((3, 0.5), (4, 0.9)):
        pipeline = one(1.0, 1.0, crossing, micro_batches=m)
        assert step_seconds(pipeline) == pytest.approx((1 + 1 + 2 * crossing) + 1.0 * (m * 10 - 1))


def test_too_few_micro_batches_for_the_latency_is_bound_by_latency() -> None:
    said = report(one(1.0, 1.0, 2.0, micro_batches=2))
    assert said.bound == "latency"
    assert said.step_seconds == pytest.approx(10 * 6 + 1)
    assert report(one(1.0, 1.0, 2.0, micro_batches=4)).step_seconds < 2 * said.step_seconds


def test_bytes_of_a_whole_cohort_share_the_port_of_their_ffn_worker() -> None:
    hop = Hop(attention_port_seconds=0.1, ffn_port_seconds=0.5)
    layer = LayerTimes(attention_seconds=1.0, ffn_seconds=1.0, out=hop, back=hop, count=20)
    few = Pipeline(layers=(layer,), attention_workers=2, micro_batches=4)
    many = Pipeline(layers=(layer,), attention_workers=8, micro_batches=4)
    assert report(few).bound != "out"
    assert report(many).bound in ("out", "back")
    assert report(many).step_seconds == pytest.approx(20 * 4 * 8 * 0.5, rel=0.1)
    assert report(without_hops(many)).exposed_hop_seconds == 0.0


def test_ffn_replicas_take_turns_with_the_micro_batches() -> None:
    alone = step_seconds(one(1.0, 4.0, micro_batches=4))
    turns = step_seconds(one(1.0, 4.0, micro_batches=4, ffn_workers=4))
    assert turns < alone / 2


def test_a_stalled_attention_worker_delays_the_others_by_at_most_the_wait() -> None:
    pipeline = one(1.0, 1.0, 0.1, micro_batches=2, attention_workers=4)
    factors = (1.0, 1.0, 1.0, 6.0)
    alone = play(pipeline)
    merged = play(pipeline, attention_factors=factors)
    apart = play(pipeline, attention_factors=factors, max_wait_seconds=0.05, fixed_share=0.0)
    assert max(merged.worker_seconds[:3]) > 4 * alone.step_seconds
    assert max(apart.worker_seconds[:3]) < 1.6 * alone.step_seconds
    assert apart.longest_wait_seconds <= 0.05 + 1e-9
    assert apart.num_calls > merged.num_calls


def test_waiting_for_everyone_runs_each_call_once() -> None:
    pipeline = one(1.0, 1.0, micro_batches=3, attention_workers=4)
    assert play(pipeline).num_calls == 10 * 3
