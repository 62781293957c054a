"""Searches the ratio: how many attention workers to an FFN worker, how many micro-batches, which batch; and whether it
pays.

Every candidate is the closed form of `pipeline.py` on the stage times of `stages.py`; the best one is played event by
event before it is reported. The yardstick is the best unsplit deployment of the same chips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec

from transload.errors import DeploymentError
from transload.hardware.afd.events import play
from transload.hardware.afd.memory import attention_memory, fewest_ffn_chips, ffn_chip_bytes, ffn_memory, ffn_stages
from transload.hardware.afd.pipeline import Bound, Pipeline, report, step_seconds
from transload.hardware.afd.stages import SplitWorker, Wire
from transload.hardware.chip import Chip
from transload.hardware.cost.energy import watts_of
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.link import LinkKind
from transload.hardware.model_card import ModelCard
from transload.hardware.parallel import Parallel
from transload.hardware.precision import Precision

Objective = Literal["chip", "usd", "watt"]
ATTENTION_WORKERS = (*range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 129, 8), *range(144, 257, 16))
"""To one FFN worker. Steps of at most an eighth: the optimum is flat."""
MOST_UNSPLIT_CHIPS = 64
LARGEST_BATCH = 4096
WORTH_GOING_ON = 0.8
"""Of the best rate so far, below which more attention workers are not tried: the FFN side is what it waits for."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked."""

    card: ModelCard
    attention_chip: Chip
    ffn_chip: Chip
    wire: Wire
    link: LinkKind | None = None
    """What the wire was made from, for the report."""
    context_tokens: int
    tpot_seconds: float
    precision: Precision
    engine: str = "generic"
    micro_batches: tuple[int, ...] = (1, 2, 3, 4)
    objective: Objective = "chip"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One way to split, at the largest batch that keeps the target and fits."""

    attention_workers: int
    ffn_workers: int
    micro_batches: int
    batch: int
    """Requests of one attention worker."""
    attention_parallel: Parallel
    ffn_parallel: Parallel
    tpot_seconds: float
    tokens_per_second: float
    per_chip: float
    """Tokens per second and chip, both kinds counted alike."""
    per_usd: float | None
    """Tokens per US dollar; None where a chip's price is unknown."""
    per_joule: float | None
    exposed_share: float
    attention_bubble: float
    ffn_bubble: float
    bound: Bound
    batch_limit: Literal["memory", "target"]

    @property
    def attention_chips(self) -> int:
        return self.attention_workers * self.attention_parallel.num_chips

    @property
    def ffn_chips(self) -> int:
        return self.ffn_workers * self.ffn_parallel.num_chips

    @property
    def ratio(self) -> float:
        """Attention chips to FFN chips."""
        return self.attention_chips / self.ffn_chips


class Unsplit(msgspec.Struct, frozen=True, kw_only=True):
    """The yardstick: whole models on one kind of chip."""

    chip: str
    parallel: Parallel
    batch: int
    """Requests of one worker."""
    tpot_seconds: float
    per_chip: float
    per_usd: float | None
    per_joule: float | None
    batch_limit: Literal["memory", "target"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the search found, best first."""

    candidates: tuple[Candidate, ...]
    unsplit: tuple[Unsplit, ...]
    """The best of each kind of chip that can hold the model."""
    gain: float | None
    """Best split over best unsplit, by the objective; None where one of them is impossible."""
    break_even_cost: float | None
    """What one FFN chip may cost (or draw, or weigh) at most, in attention chips, for some split to be worth as much
    as the best unsplit deployment on attention chips. At least 1: it pays even if both cost the same."""
    verdict: str
    refused: tuple[str, ...]
    """Why a side or a yardstick is impossible, and which objectives have no number."""
    assumptions: tuple[str, ...]
    interval: tuple[float, float]
    """Factors on durations."""
    events_seconds: float | None
    """The best candidate's step as played event by event."""


def search(question: Question) -> Answer:
    """Look at every ratio. Raises `DeploymentError` if a side fits no number of its chips."""
    refused: list[str] = []
    prices = _prices(question, refused)
    candidates = sorted(
        (found for worker in _workers(question) for found in _candidates(question, worker, prices)),
        key=lambda candidate: _score(candidate, question.objective),
        reverse=True,
    )
    if not candidates:
        refused.append(
            f"no split keeps {question.tpot_seconds * 1e3:g} ms a token at {question.context_tokens} tokens of context"
        )
    unsplit = tuple(_yardsticks(question, prices, refused))
    best = candidates[0] if candidates else None
    other = max(unsplit, key=lambda each: _score(each, question.objective), default=None)
    gain = _score(best, question.objective) / _score(other, question.objective) if best and other else None
    worker = next(iter(_workers(question)))
    return Answer(
        candidates=_distinct(candidates),
        unsplit=unsplit,
        gain=gain,
        break_even_cost=_break_even(question, candidates, unsplit),
        verdict=_verdict(question, best, other, gain),
        refused=tuple(refused),
        assumptions=tuple(dict.fromkeys((*_assumed(question), *worker.attention.assumptions, *worker.ffn.assumptions))),
        interval=_interval(worker),
        events_seconds=None if best is None else _played(question, best),
    )


def _workers(question: Question) -> Iterator[SplitWorker]:
    """Pairs of workers worth looking at: the attention side over few chips, the FFN side over the fewest that hold it
    and over more."""
    card, precision = question.card, question.precision
    for attention in _attention_splits(question):
        for ffn in _ffn_splits(question.ffn_chip, card, precision):
            yield SplitWorker(
                card,
                question.attention_chip,
                question.ffn_chip,
                question.wire,
                attention_parallel=attention,
                ffn_parallel=ffn,
                precision=precision,
                engine=question.engine,
            )


def _attention_splits(question: Question) -> list[Parallel]:
    """The fewest chips on which one request fits, and twice and four times as many. Raises `DeploymentError`."""
    splits: list[Parallel] = []
    refusal: DeploymentError | None = None
    for tensor in (1, 2, 4, 8, 16):
        if question.card.attention.num_heads % tensor:
            continue
        parallel = Parallel(tensor=tensor)
        try:
            room = attention_memory(question.attention_chip, question.card, parallel, question.precision)
        except DeploymentError as error:
            refusal = error
            continue
        if room.kv_tokens >= question.context_tokens:
            splits.append(parallel)
    if not splits:
        raise refusal or DeploymentError(
            f"{question.card.id}: {question.context_tokens} tokens of context fit no attention worker of up to 16 x "
            f"{question.attention_chip.id}"
        )
    return splits[:3]


def _ffn_splits(chip: Chip, card: ModelCard, precision: Precision) -> list[Parallel]:
    """Raises `DeploymentError` if no number of chips holds the FFN side."""
    fewest = fewest_ffn_chips(chip, card, precision)
    if fewest is None:
        ffn_memory(chip, card, Parallel(), precision)
        raise AssertionError("a split that does not fit is refused")
    usable = ffn_memory(chip, card, fewest, precision).usable_bytes
    whole = [
        stage
        for stage in ffn_stages(chip, card)
        if ffn_chip_bytes(card, stage, precision) <= usable and (stage.num_chips & (stage.num_chips - 1)) == 0
    ]
    sizes = sorted({stage.num_chips for stage in whole})[:3]
    return [stage for stage in whole if stage.num_chips in sizes] or [fewest]


Prices = tuple[tuple[float, float] | None, tuple[float, float] | None]
"""US dollars an hour and watts, each of an attention chip and an FFN chip; None where one is unknown."""


def _candidates(question: Question, worker: SplitWorker, prices: Prices) -> Iterator[Candidate]:
    most = min(LARGEST_BATCH, worker.most_requests(question.context_tokens))
    for micro_batches in question.micro_batches:
        largest, best = most, 0.0
        for attention_workers in ATTENTION_WORKERS:
            # More attention workers make FFN calls longer, so no batch that was too large becomes small enough.
            found = _candidate(question, worker, (attention_workers, 1, micro_batches), largest, prices)
            if found is None:
                break
            largest = found.batch
            limit: Literal["memory", "target"] = "memory" if found.batch == most else "target"
            yield msgspec.structs.replace(found, batch_limit=limit)
            best = max(best, found.per_chip)
            if found.per_chip < WORTH_GOING_ON * best:
                break
        for ffn_workers in (2, 3, 4):
            found = _candidate(question, worker, (1, ffn_workers, micro_batches), most, prices)
            if found is not None:
                yield found


def _candidate(
    question: Question, worker: SplitWorker, ratio: tuple[int, int, int], most: int, prices: Prices
) -> Candidate | None:
    """The largest batch up to `most` that keeps the target at this ratio; None if none does."""
    attention_workers, ffn_workers, micro_batches = ratio

    def pipeline(batch: int) -> Pipeline:
        return worker.pipeline(
            batch,
            batch * question.context_tokens,
            attention_workers=attention_workers,
            ffn_workers=ffn_workers,
            micro_batches=micro_batches,
        )

    batch = _largest(lambda size: step_seconds(pipeline(size)) <= question.tpot_seconds, most)
    if batch < micro_batches:
        return None
    said = report(pipeline(batch))
    tokens = attention_workers * batch / said.step_seconds
    chips = (attention_workers * worker.attention_parallel.num_chips, ffn_workers * worker.ffn_parallel.num_chips)
    return Candidate(
        attention_workers=attention_workers,
        ffn_workers=ffn_workers,
        micro_batches=micro_batches,
        batch=batch,
        attention_parallel=worker.attention_parallel,
        ffn_parallel=worker.ffn_parallel,
        tpot_seconds=said.step_seconds,
        tokens_per_second=tokens,
        per_chip=tokens / sum(chips),
        per_usd=_over(tokens, chips, prices[0], 3600.0),
        per_joule=_over(tokens, chips, prices[1], 1.0),
        exposed_share=said.exposed_share,
        attention_bubble=said.attention_bubble,
        ffn_bubble=said.ffn_bubble,
        bound=said.bound,
        batch_limit="memory" if batch == most else "target",
    )


def _over(tokens: float, chips: tuple[int, int], each: tuple[float, float] | None, seconds: float) -> float | None:
    if each is None:
        return None
    return tokens * seconds / (chips[0] * each[0] + chips[1] * each[1])


def _largest(keeps: Callable[[int], bool], most: int) -> int:
    """The largest size up to `most` that keeps the target, which larger ones do not; 0 if none does."""
    if most < 1 or keeps(most):
        return max(0, most)
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if keeps(middle):
            low = middle
        else:
            high = middle
    return low


def _yardsticks(question: Question, prices: Prices, refused: list[str]) -> Iterator[Unsplit]:
    """The best unsplit worker on each of the two chips: any number of chips of one kind that holds the model."""
    chips = {question.attention_chip.id: question.attention_chip, question.ffn_chip.id: question.ffn_chip}
    for index, chip in enumerate(chips.values()):
        own = tuple(None if each is None else each[index] for each in prices)
        found: list[Unsplit] = []
        why: DeploymentError | None = None
        for parallel in _unsplit_splits(question.card):
            try:
                unsplit = _unsplit(question, chip, parallel, own)
            except DeploymentError as error:
                why = error
                continue
            if unsplit is not None:
                found.append(unsplit)
        if found:
            yield max(found, key=lambda each: _score(each, question.objective))
        else:
            refused.append(f"unsplit on {chip.id}: {why if why is not None else 'no batch keeps the target'}")


def _unsplit_splits(card: ModelCard) -> list[Parallel]:
    sizes = (1, 2, 4, 8, 16, 32, 64)
    splits = [Parallel(tensor=size) for size in sizes[:5] if card.attention.num_heads % size == 0]
    if card.experts is not None:
        splits += [
            Parallel(data_attention=size, expert=size) for size in sizes[1:] if card.experts.num_experts % size == 0
        ]
    return splits


def _unsplit(question: Question, chip: Chip, parallel: Parallel, prices: tuple[float | None, ...]) -> Unsplit | None:
    worker = WorkerCost(chip, question.card, parallel, question.precision, question.engine)
    most = min(LARGEST_BATCH * parallel.data_attention, worker.capacity.kv_tokens // question.context_tokens)
    if most < 1:
        return None

    def seconds(batch: int) -> float:
        fixed, each = worker.decode_coefficients(batch)
        return fixed + each * batch * question.context_tokens

    ranks = parallel.data_attention
    batch = ranks * _largest(lambda size: seconds(size * ranks) <= question.tpot_seconds, most // ranks)
    if batch < 1:
        return None
    rate = batch / seconds(batch) / parallel.num_chips
    return Unsplit(
        chip=chip.id,
        parallel=parallel,
        batch=batch,
        tpot_seconds=seconds(batch),
        per_chip=rate,
        per_usd=None if prices[0] is None else rate * 3600.0 / prices[0],
        per_joule=None if prices[1] is None else rate / prices[1],
        batch_limit="memory" if batch // ranks == most // ranks else "target",
    )


def _prices(question: Question, refused: list[str]) -> Prices:
    """Where both are known. Raises `DeploymentError` if the objective is not."""
    found: list[tuple[float, float] | None] = []
    for name, objective, read in (("per USD", "usd", _usd_per_hour), ("per watt", "watt", _watts)):
        try:
            found.append((read(question.attention_chip), read(question.ffn_chip)))
        except DeploymentError as error:
            if question.objective == objective:
                raise DeploymentError(f"tokens {name}: {error}") from None
            refused.append(f"tokens {name}: {error}")
            found.append(None)
    return found[0], found[1]


def _usd_per_hour(chip: Chip) -> float:
    return chip.need("price.per_hour").value


def _watts(chip: Chip) -> float:
    return watts_of(chip).busy


def _interval(worker: SplitWorker) -> tuple[float, float]:
    """Of the two sides the wider."""
    sides = (worker.attention.interval, worker.ffn.interval)
    return min(low for low, _ in sides), max(high for _, high in sides)


def _assumed(question: Question) -> list[str]:
    return [f"assumed: {assumption}" for assumption in question.link.assumptions()] if question.link else []


def _break_even(question: Question, candidates: list[Candidate], unsplit: tuple[Unsplit, ...]) -> float | None:
    rates = [each.per_chip for each in unsplit if each.chip == question.attention_chip.id]
    if not rates:
        return None
    return max(
        ((each.tokens_per_second / rates[0] - each.attention_chips) / each.ffn_chips for each in candidates),
        default=None,
    )


def _score(found: Candidate | Unsplit, objective: Objective) -> float:
    value = {"chip": found.per_chip, "usd": found.per_usd, "watt": found.per_joule}[objective]
    assert value is not None, "an objective without a number was refused"
    return value


def _distinct(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The best micro-batch count and FFN worker size of each ratio, best first."""
    seen: dict[tuple[int, int], Candidate] = {}
    for candidate in candidates:
        divisor = math.gcd(candidate.attention_chips, candidate.ffn_chips)
        seen.setdefault((candidate.attention_chips // divisor, candidate.ffn_chips // divisor), candidate)
    return tuple(seen.values())


def _verdict(question: Question, best: Candidate | None, other: Unsplit | None, gain: float | None) -> str:
    unit = {"chip": "tokens per second and chip", "usd": "tokens per dollar", "watt": "tokens per joule"}
    said = unit[question.objective]
    if best is None:
        return "a split is impossible here"
    if other is None or gain is None:
        return f"only a split is possible: unsplit, neither chip holds the model within {MOST_UNSPLIT_CHIPS} chips"
    if gain > 1.02:
        return f"the split pays: {gain:.2f} times the {said} of {other.parallel.num_chips} x {other.chip} unsplit"
    if gain >= 0.98:
        return f"no difference: {gain:.2f} times the {said} of {other.parallel.num_chips} x {other.chip} unsplit"
    return f"the split does not pay: {gain:.2f} times the {said} of {other.parallel.num_chips} x {other.chip} unsplit"


def _played(question: Question, best: Candidate) -> float:
    """The best candidate event by event; of many equal attention workers a part that keeps the ratio of bytes."""
    worker = SplitWorker(
        question.card,
        question.attention_chip,
        question.ffn_chip,
        question.wire,
        attention_parallel=best.attention_parallel,
        ffn_parallel=best.ffn_parallel,
        precision=question.precision,
        engine=question.engine,
    )
    pipeline = worker.pipeline(
        best.batch,
        best.batch * question.context_tokens,
        attention_workers=best.attention_workers,
        ffn_workers=best.ffn_workers,
        micro_batches=best.micro_batches,
    )
    return play(pipeline).step_seconds
