"""The ratio search: targets and memory are kept, the yardstick is fair, and it says when a split does not pay."""

from __future__ import annotations

import msgspec
import pytest

from transload.errors import DeploymentError
from transload.hardware.afd.search import Answer, Question, search
from transload.hardware.afd.stages import Wire
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.precision import with_weights
from transload.hardware.slots import parse_assumption


def question(
    model: str = "qwen3-235b-a22b", attention: str = "gb200", ffn: str = "gb200", **kwargs: object
) -> Question:
    card = load_model(model)
    asked = Question(
        card=card,
        attention_chip=load_chip(attention),
        ffn_chip=load_chip(ffn),
        wire=Wire(latency_seconds=5e-6, attention_bytes_per_second=900e9, ffn_bytes_per_second=900e9),
        context_tokens=16384,
        tpot_seconds=0.05,
        precision=with_weights(card.precision, "fp8"),
        micro_batches=(2,),
    )
    return msgspec.structs.replace(asked, **kwargs)


@pytest.fixture(scope="module")
def answer() -> Answer:
    return search(question())


def test_candidates_keep_the_target_and_are_sorted(answer: Answer) -> None:
    assert answer.candidates
    rates = [candidate.per_chip for candidate in answer.candidates]
    assert rates == sorted(rates, reverse=True)
    assert all(candidate.tpot_seconds <= 0.05 for candidate in answer.candidates)
    ratios = [candidate.ratio for candidate in answer.candidates]
    assert len(ratios) == len(set(ratios))


def test_the_best_is_confirmed_by_the_events(answer: Answer) -> None:
    assert answer.events_seconds == pytest.approx(answer.candidates[0].tpot_seconds, rel=0.02)


def test_the_yardstick_keeps_the_target_too(answer: Answer) -> None:
    (unsplit,) = answer.unsplit
    assert unsplit.tpot_seconds <= 0.05
    assert answer.gain == pytest.approx(answer.candidates[0].per_chip / unsplit.per_chip)


def test_the_search_is_the_same_twice() -> None:
    asked = question("llama-3.1-70b", "h100", "h100", context_tokens=4096)
    assert search(asked) == search(asked)


def test_a_slow_link_makes_a_split_not_pay() -> None:
    slow = Wire(latency_seconds=100e-6, attention_bytes_per_second=50e9, ffn_bytes_per_second=50e9)
    found = search(question(wire=slow))
    assert found.gain is not None
    assert found.gain < 0.9
    assert "does not pay" in found.verdict


def test_a_target_that_nothing_keeps_is_said() -> None:
    found = search(question("llama-3.1-70b", "h100", "h100", tpot_seconds=0.0005))
    assert found.candidates == ()
    assert found.verdict == "a split is impossible here"
    assert any("no split keeps 0.5 ms" in why for why in found.refused)


def test_unknown_prices_are_refused_by_name_only_where_they_are_asked_for() -> None:
    asked = question("llama-3.1-8b", "r200", "lp30", context_tokens=8192)
    found = search(asked)
    assert all(candidate.per_usd is None and candidate.per_joule is None for candidate in found.candidates)
    assert any("groq3_lp30: price.per_hour is unknown" in why for why in found.refused)
    with pytest.raises(DeploymentError, match=r"tokens per USD: groq3_lp30: price\.per_hour is unknown"):
        search(msgspec.structs.replace(asked, objective="usd"))


def test_an_assumed_price_is_used() -> None:
    asked = question("llama-3.1-8b", "r200", "lp30", context_tokens=8192, objective="usd")
    lpu = asked.ffn_chip
    cheap, dear = (
        lpu.assuming([parse_assumption(f"groq3_lp30.price.per_hour={price} USD/h")]) for price in ("0.01", "100")
    )
    gains = [search(msgspec.structs.replace(asked, ffn_chip=chip)).gain for chip in (cheap, dear)]
    assert gains[0] is not None
    assert gains[1] is not None
    assert gains[0] > gains[1]


def test_break_even_cost_is_where_the_split_is_worth_as_much() -> None:
    found = search(question("llama-3.1-8b", "r200", "lp30", context_tokens=8192))
    cost = found.break_even_cost
    assert cost is not None
    unsplit = next(each for each in found.unsplit if each.chip == "rubin_r200")
    worth = max(c.tokens_per_second / (c.attention_chips + cost * c.ffn_chips) for c in found.candidates)
    assert worth == pytest.approx(unsplit.per_chip, rel=0.02)
