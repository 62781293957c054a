"""Who is let in, when a refused caller should come back, and that there is a place for it then."""

from __future__ import annotations

import heapq
from itertools import count
from random import Random

import pytest

from transload.control.admission import (
    GRACE_SECONDS,
    LEAST_SHARE_BACK,
    LONGEST_RETRY_SECONDS,
    PROMISED_SHARE,
    Admission,
)

FULL = 256


def busy(admission: Admission, seconds_between: float, times: int = 200, start: float = 0.0) -> float:
    """Requests that waited are served at this pace; returns when the last one was."""
    now = start
    for _ in range(times):
        now += seconds_between
        admission.served(start - 1, now)
    return now


def refused(admission: Admission, now: float, caller: int = 0) -> float:
    seconds = admission.ask(caller, FULL, FULL * admission.seconds_between, now)
    assert seconds is not None
    return seconds


def test_each_refused_caller_is_given_the_next_place() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    assert [refused(admission, now) for _ in range(4)] == pytest.approx(
        [2.0 / PROMISED_SHARE * place for place in (1, 2, 3, 4)], rel=0.01
    )


def test_places_that_have_passed_are_not_promised_again() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    for _ in range(3):
        refused(admission, now)
    assert refused(admission, now + 4) == pytest.approx(8.0 / PROMISED_SHARE - 4.0, rel=0.01)
    assert refused(admission, now + 100) == pytest.approx(2.0 / PROMISED_SHARE, rel=0.01)


def test_nobody_is_told_to_come_back_sooner_than_in_a_second() -> None:
    admission = Admission()
    assert refused(admission, busy(admission, 0.001)) == pytest.approx(1.0)


def test_hours_without_requests_do_not_count_as_slow_service() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    for _ in range(50):
        now += 3600
        admission.served(now, now)  # came and was served at once
    assert admission.seconds_between == pytest.approx(2.0, rel=0.01)


def test_a_flood_of_refusals_keeps_nobody_away_for_long_and_no_more_places_than_that() -> None:
    admission = Admission()
    now = busy(admission, 1.0)
    assert max(refused(admission, now, caller) for caller in range(1, 3_000)) == LONGEST_RETRY_SECONDS
    assert admission.num_places <= LONGEST_RETRY_SECONDS + 1


def test_one_caller_who_asks_again_and_again_does_not_get_all_places() -> None:
    admission = Admission()
    now = busy(admission, 0.1)
    for _ in range(1000):
        refused(admission, now, 7)
    assert admission.num_places == 16


def test_who_comes_back_in_time_is_let_in_and_a_newcomer_is_not() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    later = now + refused(admission, now, caller=5)
    assert admission.ask(6, FULL - 1, 0.0, later) is not None  # the one free place is kept
    assert admission.ask(5, FULL, 0.0, later) is None
    assert admission.num_places == 1  # the newcomer's


def test_a_place_is_kept_for_a_while_only() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    later = now + refused(admission, now, caller=5) + GRACE_SECONDS + 0.1
    assert admission.ask(6, FULL - 1, 0.0, later) is None
    assert admission.num_places == 0


def test_where_few_come_back_places_are_given_out_more_densely_and_keep_fewer_out() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    for caller in range(1, 200):
        now += refused(admission, now, caller) + GRACE_SECONDS + 0.1  # never seen again
        admission.ask(0, 0, 0.0, now)
    first, second = refused(admission, now, 1000), refused(admission, now, 1001)
    assert second - first == pytest.approx(2.0 * LEAST_SHARE_BACK / PROMISED_SHARE, rel=0.01)
    assert admission.ask(0, FULL - 2, 0.0, now + second) is None


@pytest.mark.parametrize("share_back", [1.0, 0.3])
def test_at_five_times_what_can_be_served_those_who_come_back_when_told_are_served(share_back: float) -> None:
    """A queue with room for ten, one served a second, five new callers a second, some of whom come back when told."""
    random, admission = Random(3), Admission(max_waiting=10)
    waiting: list[float] = []
    back: list[tuple[float, int]] = []
    kept = broken = idle = 0
    now, served_at, caller = 0.0, 0.0, 0
    for tick in range(6000):
        now = tick / 20
        coming = [who for at, who in back if at <= now]
        back = [each for each in back if each[0] > now]
        if tick % 4 == 0:
            caller += 1
            coming.append(-caller)
        for who in coming:
            seconds = admission.ask(abs(who), len(waiting), len(waiting) * admission.seconds_between, now)
            if who > 0 and now > 60.0:
                kept, broken = kept + (seconds is None), broken + (seconds is not None)
            if seconds is None:
                waiting.append(now)
            elif random.random() < share_back:
                back.append((now + -(-seconds // 1), abs(who)))  # told in whole seconds
        if now >= served_at + 1.0:
            served_at = now
            if waiting:
                admission.served(waiting.pop(0), now)
            else:
                idle += now > 60.0
    assert kept > 40
    assert broken < 0.1 * kept
    assert idle < 12  # of 240: kept places do not keep it from working


class Shop:
    """One after the other is served, at a pace that changes; new callers come at `rate`, and a share of those who are
    refused when they were told to. Estimates of the first token are right as of when they are made."""

    TARGET, SECONDS = 2.0, 180.0

    def __init__(self, rate: float, share_back: float, paces: list[float]) -> None:
        self.random, self.share_back, self.paces = Random(1), share_back, paces
        self.admission = Admission(256, self.TARGET)
        self.events: list[tuple[float, int, str, int]] = []
        self.numbers = count(1)
        self.waiting: list[tuple[float, float]] = []
        self.ttft: list[float] = []
        self.kept = self.put_off = 0
        at = 0.0
        while at < self.SECONDS:
            self.push(at, "new", next(self.numbers))
            at += self.random.expovariate(rate)

    def push(self, at: float, what: str, caller: int) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), what, caller))

    def pace(self, now: float) -> float:
        """Seconds a request takes."""
        return self.paces[int(now // 20.0) % len(self.paces)]

    def run(self) -> None:
        while self.events:
            now, _, what, caller = heapq.heappop(self.events)
            if what == "served":
                since, foretold = self.waiting.pop(0)
                self.admission.served(since, now, foretold or None)
                self.ttft.append(now - since)
            else:
                self.ask(now, what, caller)
                if len(self.waiting) != 1 or any(event[2] == "served" for event in self.events):
                    continue
            if self.waiting:
                self.push(now + self.pace(now) * self.random.uniform(0.7, 1.3), "served", 0)

    def ask(self, now: float, what: str, caller: int) -> None:
        foretold = (len(self.waiting) + 1) * self.pace(now) if self.waiting else 0.0
        seconds = self.admission.ask(caller, 0, foretold, now)
        if seconds is None:
            self.waiting.append((now, foretold))
            self.kept += what == "back"
        elif what == "back":
            self.put_off += 1
        elif self.random.random() < self.share_back and now + seconds < self.SECONDS:
            self.push(now + -(-seconds // 1), "back", caller)


@pytest.mark.parametrize("share_back", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("paces", [[0.3], [0.18, 0.3, 0.4, 0.24, 0.36, 0.22]], ids=["steady", "changing"])
@pytest.mark.parametrize("rate", [5.0, 15.0])
def test_with_a_target_who_is_let_in_meets_it_and_who_comes_back_is_let_in(
    rate: float, paces: list[float], share_back: float
) -> None:
    shop = Shop(rate, share_back, paces)
    shop.run()
    assert sum(seconds <= shop.TARGET for seconds in shop.ttft) > 0.95 * len(shop.ttft)
    assert shop.put_off <= (0.05 if len(paces) == 1 else 0.25) * shop.kept
    could = sum(20.0 / paces[part % len(paces)] for part in range(9))
    assert len(shop.ttft) > 0.9 * could  # keeping places does not leave it idle


def test_with_a_target_only_who_should_meet_it_is_let_in() -> None:
    admission = Admission(ttft_seconds=2.0)
    assert admission.ask(0, 0, 1.5, 0.0) is None
    assert admission.ask(0, 3, 2.5, 0.0) is not None
    assert admission.ask(0, 0, 0.0, 0.0) is None  # nobody else is there: never refused


def test_estimates_that_were_too_short_make_it_careful() -> None:
    admission = Admission(ttft_seconds=2.0)
    for number in range(60):
        admission.served(number, number + 1.6, foretold=0.8)
    assert admission.ask(0, 1, 1.5, 100.0) is not None
    assert admission.ask(0, 1, 0.5, 100.0) is None


def test_the_expected_length_follows_the_texts() -> None:
    admission = Admission()
    assert admission.expected_outputs == 128.0
    for _ in range(200):
        admission.finished(20)
    assert admission.expected_outputs == pytest.approx(20, rel=0.01)


def test_the_choices_of_one_call_have_one_place_together() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    at = now + refused(admission, now, caller=7)
    refused(admission, now, caller=8)
    waits = FULL * admission.seconds_between
    assert [admission.ask(7, FULL, waits, at + 0.001 * choice) for choice in range(4)] == [None] * 4
    assert admission.ask(9, FULL, waits, at + 0.01) is not None
    assert admission.ask(7, FULL, waits, at + 0.5) is not None
