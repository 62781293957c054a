"""Drawing: literal expectations for each option, statistics for the distribution, independence from the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from transload.control.messages import Chunk, Request, RequestId, Sampled, Sampling
from transload.model import sampler
from transload.model.sampler import Sampler, uniform

GREEDY = Sampling(temperature=0.0)


def chunk_of(
    sampling: Sampling, prompt: Sequence[int] = (0,), outputs: Sequence[int] = (), request: int = 1, place: int = -1
) -> Chunk:
    """The chunk that ends with the last known token; it draws output `place` (default: the next one)."""
    tokens = [*prompt, *outputs]
    return Chunk(
        request=Request(id=RequestId(request), num_prompt_tokens=len(prompt), max_tokens=99, sampling=sampling),
        start=len(tokens) - 1,
        num_tokens=1,
        tokens=tokens,
        blocks=[],
        samples=True,
        num_outputs=len(outputs) if place < 0 else place,
    )


def draw(logits: Sequence[float] | torch.Tensor, sampling: Sampling, **more: Any) -> int:
    row = torch.as_tensor(logits).float()[None]
    return Sampler().sample(row, [chunk_of(sampling, **more)])[0].token


def drawn(logits: Sequence[float] | torch.Tensor, sampling: Sampling, num_draws: int = 400) -> Counter[int]:
    """Tokens of many places of one request: each place has its own uniform number."""
    rows = torch.as_tensor(logits).float().expand(num_draws, -1).contiguous()
    chunks = [chunk_of(sampling, place=place) for place in range(num_draws)]
    return Counter(sampled.token for sampled in Sampler().sample(rows, chunks))


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


# ---------------------------------------------------------------------------------------------------------------------
# Greedy


@pytest.mark.parametrize("vocab_size", [7, 64, 320, 1000, 32_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_takes_the_largest_logit(vocab_size: int, dtype: torch.dtype) -> None:
    logits = random_logits(5, vocab_size).to(dtype)
    got = [sampled.token for sampled in Sampler().sample(logits, [chunk_of(GREEDY)] * 5)]
    assert got == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [5, 320, 32_000])
def test_equal_largest_logits_give_the_lowest_id(vocab_size: int) -> None:
    logits = torch.zeros(vocab_size)
    logits[[2, 3, vocab_size - 1]] = 1.0
    assert draw(logits, GREEDY) == 2
    assert draw(logits, Sampling(temperature=0.0, presence_penalty=0.5)) == 2


def test_a_tiny_temperature_is_greedy() -> None:
    assert draw([0.0, 1e-3, 0.0], Sampling(temperature=1e-6)) == 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3), Sampling(temperature=0.0, logprobs=1)])
def test_logits_that_are_not_numbers_are_refused(sampling: Sampling) -> None:
    logits = random_logits(2, 320)
    logits[1, 17] = math.nan
    with pytest.raises(ArithmeticError, match="request 8: the logits after 1 tokens are not numbers"):
        Sampler().sample(logits, [chunk_of(sampling, request=7), chunk_of(sampling, request=8)])


# ---------------------------------------------------------------------------------------------------------------------
# Random draws


def test_uniform_numbers_are_fixed_for_all_time() -> None:
    """They are part of what a seed means: a change of these values changes every seeded text."""
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(-1, 0)] == [
        0.8615310771253482,
        0.9158894754134977,
        0.16315147435832145,
        0.3815995630890602,
    ]
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_uniform_numbers_are_uniform() -> None:
    numbers = [uniform(seed, place) for seed in range(40) for place in range(500)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    buckets = Counter(int(number * 20) for number in numbers)
    chi_squared = sum((buckets[bucket] - 1000) ** 2 / 1000 for bucket in range(20))
    assert chi_squared < 43.8  # 19 degrees of freedom, p = 0.001


def test_the_draw_inverts_the_distribution_from_the_best_token_down() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    order, cumulated = [1, 2, 3, 0], [0.4, 0.7, 0.9, 1.0]
    for place in range(200):
        number = uniform(5, place)
        want = next(token for token, end in zip(order, cumulated, strict=True) if number < end)
        assert draw(logits, Sampling(seed=5), place=place) == want


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    counts = drawn(probabilities.log(), Sampling(), num_draws=8000)
    chi_squared = sum((counts[token] - 8000 * p) ** 2 / (8000 * p) for token, p in enumerate(probabilities.tolist()))
    assert chi_squared < 16.3  # 3 degrees of freedom, p = 0.001


def test_temperature_flattens_the_distribution() -> None:
    probabilities = torch.tensor([0.8, 0.2])
    counts = drawn(probabilities.log(), Sampling(temperature=2.0), num_draws=8000)
    want = 0.8**0.5 / (0.8**0.5 + 0.2**0.5)
    assert abs(counts[0] / 8000 - want) < 0.02


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """transformers' probabilities for these options."""
    warpers: Any = LogitsProcessorList()
    warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    scores: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None])
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=5),
        Sampling(top_p=0.7),
        Sampling(min_p=0.1),
        Sampling(temperature=0.6, top_k=50, top_p=0.8),
        Sampling(temperature=1.7, top_k=200, top_p=0.95, min_p=0.02),
        Sampling(temperature=3.0, top_p=0.999),
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
        Sampling(min_p=1.0),
        Sampling(temperature=5.0),
        Sampling(top_k=100_000),
    ],
)
@pytest.mark.parametrize("vocab_size", [50, 3000])
def test_filters_keep_what_those_of_transformers_keep(sampling: Sampling, vocab_size: int) -> None:
    """Every draw inverts the distribution that transformers leaves, ranked from the best token down."""
    logits = random_logits(1, vocab_size, spread=2.0)[0]
    probabilities = warped(logits, sampling)
    order = logits.sort(descending=True, stable=True).indices
    cumulated = probabilities[order].double().cumsum(0)
    rows = logits.expand(300, -1).contiguous()
    chunks = [chunk_of(sampling, place=place) for place in range(300)]
    for place, sampled in enumerate(Sampler().sample(rows, chunks)):
        number = uniform(sampling.seed, place) * float(cumulated[-1])
        rank = int((order == sampled.token).nonzero())
        assert probabilities[sampled.token] > 0
        assert (float(cumulated[rank - 1]) if rank else 0.0) - 1e-5 <= number <= float(cumulated[rank]) + 1e-5


def test_equal_logits_are_ranked_by_id_however_many_there_are() -> None:
    """Whole vocabularies of ties: more than any ranked prefix can hold."""
    logits = torch.zeros(3000)
    assert set(drawn(logits, Sampling(top_k=3))) == {0, 1, 2}
    for place in range(50):
        assert draw(logits, Sampling(seed=3), place=place) == int(uniform(3, place) * 3000)


def test_rounded_logits_draw_by_id_among_equals() -> None:
    logits = random_logits(1, 3000).bfloat16().float()[0]
    ranked = sorted(range(3000), key=lambda token: (-float(logits[token]), token))
    assert set(drawn(logits, Sampling(top_k=70, temperature=50.0), num_draws=3000)) == set(ranked[:70])


def test_the_whole_ranking_is_that_of_a_stable_sort() -> None:
    logits = torch.cat((random_logits(2, 3000), random_logits(2, 3000).bfloat16().float()), 1)
    logits[:, 10:20] = torch.tensor([0.0, -0.0, -math.inf, math.inf, 1e-45, -1e-45, 3e38, -3e38, 0.0, -0.0])
    ids, certain = sampler._ranked(logits)
    assert torch.equal(ids, logits.sort(dim=-1, descending=True, stable=True).indices)
    assert certain.tolist() == [[6000], [6000]]


def test_a_draw_never_gives_a_forbidden_token() -> None:
    logits = torch.full((3000,), -math.inf)
    logits[2999] = -5.0
    assert drawn(logits, Sampling(temperature=2.0)) == Counter({2999: 400})


# ---------------------------------------------------------------------------------------------------------------------
# Options that change logits


def test_logit_bias_is_added() -> None:
    assert draw([0.0, 1.0, 2.0], Sampling(temperature=0.0, logit_bias=((0, 2.5),))) == 0
    assert draw([0.0, 1.0, 2.0], Sampling(temperature=0.0, logit_bias=((2, -100.0), (0, 0.5)))) == 1


def test_stop_ids_are_not_drawn_before_the_minimum_length() -> None:
    sampling = Sampling(temperature=0.0, min_tokens=2, stop_ids=(2, 1))
    logits = [0.0, 1.0, 2.0]
    assert [draw(logits, sampling, outputs=[0] * count) for count in range(4)] == [0, 0, 2, 2]


def test_presence_and_frequency_count_outputs_alone() -> None:
    logits = [0.0, 1.0, 0.9]
    presence = Sampling(temperature=0.0, presence_penalty=0.2)
    assert draw(logits, presence, prompt=[1, 1]) == 1
    assert draw(logits, presence, prompt=[0], outputs=[1]) == 2
    frequency = Sampling(temperature=0.0, frequency_penalty=0.06)
    assert draw(logits, frequency, outputs=[1]) == 1
    assert draw(logits, frequency, outputs=[1, 1]) == 2


def test_repetition_counts_prompt_and_outputs_as_transformers_does() -> None:
    prompt, outputs = [3, 5, 5, 8], [2, 3]
    logits = random_logits(1, 10)
    processor: Any = RepetitionPenaltyLogitsProcessor(1.7)
    want = processor(torch.tensor([[*prompt, *outputs]]), logits.clone())
    chunk = chunk_of(Sampling(temperature=0.0, repetition_penalty=1.7), prompt, outputs)
    got = Sampler()._adjust(logits, [chunk])
    torch.testing.assert_close(got, want)


def test_penalties_are_the_same_however_a_request_came_here() -> None:
    """Counted step by step, or at once after a handoff, or anew after the tokens were taken back."""
    sampling = Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3)
    rng = random.Random(1)
    prompt, outputs = rng.choices(range(20), k=300), rng.choices(range(20), k=40)
    stepwise = Sampler()
    logits = random_logits(1, 20)
    for count in range(41):
        got = stepwise._adjust(logits, [chunk_of(sampling, prompt, outputs[:count])])
        want = Sampler()._adjust(logits, [chunk_of(sampling, prompt, outputs[:count])])
        assert torch.equal(got, want)
    other = [9, *outputs[1:20]]
    assert torch.equal(
        stepwise._adjust(logits, [chunk_of(sampling, prompt, other)]),
        Sampler()._adjust(logits, [chunk_of(sampling, prompt, other)]),
    )


def test_the_memory_of_penalties_is_bounded() -> None:
    bounded = Sampler()
    for request in range(1500):
        bounded.sample(torch.zeros(1, 4), [chunk_of(Sampling(presence_penalty=1.0), request=request)])
    assert len(bounded._penalties._histories) == 1024


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 1.0])
    sampling = Sampling(temperature=0.0, logprobs=3, logit_bias=((2, 100.0),))
    (sampled,) = Sampler().sample(logits[None], [chunk_of(sampling)])
    assert sampled.token == 2
    assert sampled.logprobs is not None
    want = logits.log_softmax(-1).tolist()
    assert sampled.logprobs.logprob == pytest.approx(want[2])
    assert [token for token, _ in sampled.logprobs.top] == [0, 1, 3]
    assert [value for _, value in sampled.logprobs.top] == pytest.approx([want[0], want[1], want[3]])


def test_zero_top_logprobs_give_the_drawn_tokens_alone() -> None:
    (sampled,) = Sampler().sample(torch.tensor([[0.0, 1.0]]), [chunk_of(Sampling(temperature=0.0, logprobs=0))])
    assert sampled.logprobs is not None
    assert sampled.logprobs.top == ()
    assert sampled.logprobs.logprob == pytest.approx(math.log(math.e / (1 + math.e)))


def test_top_logprobs_among_equals_are_the_lowest_ids() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, 1234] = 1.0
    (sampled,) = Sampler().sample(logits, [chunk_of(Sampling(temperature=0.0, logprobs=4))])
    assert sampled.logprobs is not None
    assert [token for token, _ in sampled.logprobs.top] == [1234, 0, 1, 2]


def test_more_top_logprobs_than_tokens_give_all() -> None:
    (sampled,) = Sampler().sample(torch.tensor([[0.0, 1.0]]), [chunk_of(Sampling(temperature=0.0, logprobs=20))])
    assert sampled.logprobs is not None
    assert len(sampled.logprobs.top) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The batch


VARIETY = [
    Sampling(seed=11),
    GREEDY,
    Sampling(seed=12, top_p=0.9),
    Sampling(seed=13, top_k=40, logprobs=2),
    Sampling(temperature=0.0, logprobs=5),
    Sampling(seed=14, temperature=1.9, min_p=0.05, repetition_penalty=1.2),
    Sampling(temperature=0.0, frequency_penalty=0.7),
    Sampling(seed=15, temperature=8.0),
    Sampling(seed=16, logit_bias=((3, 5.0),), min_tokens=9, stop_ids=(4,)),
]


def test_a_token_does_not_depend_on_the_batch_it_is_drawn_in() -> None:
    vocab_size = 2048
    logits = random_logits(len(VARIETY), vocab_size)
    rng = random.Random(2)
    chunks = [
        chunk_of(sampling, rng.choices(range(vocab_size), k=30), rng.choices(range(vocab_size), k=7), request=request)
        for request, sampling in enumerate(VARIETY)
    ]
    alone = [Sampler().sample(logits[row : row + 1], [chunk])[0] for row, chunk in enumerate(chunks)]
    shared = Sampler()
    for _ in range(10):
        order = rng.sample(range(len(chunks)), k=rng.randint(1, len(chunks)))
        together = shared.sample(logits[order], [chunks[place] for place in order])
        assert list(together) == [alone[place] for place in order]


def test_results_come_in_the_order_of_the_chunks() -> None:
    logits = torch.eye(3) * 9
    samplings = [Sampling(temperature=0.0, logprobs=0), GREEDY, Sampling(top_k=1)]
    got = Sampler().sample(logits, [chunk_of(s, request=10 + n) for n, s in enumerate(samplings)])
    assert [(sampled.request, sampled.token) for sampled in got] == [(10, 0), (11, 1), (12, 2)]
    assert [sampled.logprobs is None for sampled in got] == [False, True, True]
    assert all(isinstance(sampled, Sampled) for sampled in got)
