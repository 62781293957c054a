"""Drawing tokens: from logits and a request's `Sampling` to one token a row.

Owns the order in which options apply: penalties, logit bias, minimum length; then temperature, top-k, top-p, min-p.
Keeps no random state: output n of a request takes one uniform number that is a function of (seed, n), so a token
depends on nothing but its logits, its options and its place. Never stops a request: the engine does.

Shapes: R rows, V vocabulary, P ranked candidates.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

import torch

from transload.control.messages import Chunk, Sampled, Sampling, TokenLogprobs
from transload.model.native.packed import first_largest as native_first_largest
from transload.model.penalties import PenaltyCounts, has_penalties

_GREEDY_BELOW = 1e-5
"""Temperatures under this are zero: dividing by them overflows."""
_SHORT_PREFIX = 64
_LONG_PREFIX = 2048
"""How many of the best candidates are looked at before the whole vocabulary is: most draws end among the first."""
_ARGMAX_GROUPS = (256, 128, 64, 32)


def uniform(seed: int, num_outputs: int) -> float:
    """The number in [0, 1) that draws output token `num_outputs` of a request: 53 bits of blake2b(seed, n)."""
    key = struct.pack("<QQ", seed % 2**64, num_outputs)
    return (int.from_bytes(blake2b(key, digest_size=8, person=b"transload-rng").digest(), "little") >> 11) / 2**53


class Sampler:
    """Draws one token for each row of logits."""

    def __init__(self) -> None:
        self._penalties = PenaltyCounts()

    def sample(self, logits_RV: torch.Tensor, chunks: Sequence[Chunk]) -> tuple[Sampled, ...]:
        """The tokens of `chunks` in their order; row i of the logits is what follows chunk i.

        Raises `ArithmeticError` if a row's logits are not numbers: damaged weights or cache must not become text.
        """
        assert logits_RV.shape[0] == len(chunks)
        plain = [row for row, chunk in enumerate(chunks) if _is_plain_greedy(chunk.request.sampling, chunk.num_outputs)]
        tokens = [0] * len(chunks)
        logprobs: list[TokenLogprobs | None] = [None] * len(chunks)
        if plain:
            subset = logits_RV if len(plain) == len(chunks) else logits_RV[plain]
            for row, token in zip(plain, _first_argmax(subset.float()).tolist(), strict=True):
                tokens[row] = token
        if len(plain) < len(chunks):
            full = sorted(set(range(len(chunks))) - set(plain))
            self._sample_with_options(logits_RV[full].float(), full, chunks, tokens, logprobs)
        _refuse_nan(logits_RV, tokens, chunks)
        return tuple(
            Sampled(request=chunk.request.id, token=token, logprobs=logprob)
            for chunk, token, logprob in zip(chunks, tokens, logprobs, strict=True)
        )

    def _sample_with_options(
        self,
        raw_RV: torch.Tensor,
        rows: list[int],
        chunks: Sequence[Chunk],
        tokens: list[int],
        logprobs: list[TokenLogprobs | None],
    ) -> None:
        """Draw for these rows, float32 logits `raw_RV`, into `tokens` and `logprobs`."""
        own = [chunks[row] for row in rows]
        adjusted_RV = self._adjust(raw_RV, own)
        greedy = [place for place, chunk in enumerate(own) if chunk.request.sampling.temperature < _GREEDY_BELOW]
        random = [place for place, chunk in enumerate(own) if chunk.request.sampling.temperature >= _GREEDY_BELOW]
        if greedy:
            for place, token in zip(greedy, _first_argmax(adjusted_RV[greedy]).tolist(), strict=True):
                tokens[rows[place]] = token
        if random:
            subset = adjusted_RV if len(random) == len(own) else adjusted_RV[random]
            for place, token in zip(random, _draw(subset, [own[place] for place in random]), strict=True):
                tokens[rows[place]] = token
        for place, chunk in enumerate(own):
            wanted = chunk.request.sampling.logprobs
            if wanted is not None:
                logprobs[rows[place]] = _logprobs(raw_RV[place], tokens[rows[place]], wanted)

    def _adjust(self, raw_RV: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits after penalties, bias and minimum length; the same tensor if nothing changes."""
        if not any(_is_adjusted(chunk.request.sampling, chunk.num_outputs) for chunk in chunks):
            return raw_RV
        adjusted_RV = raw_RV.clone()
        self._penalties.apply(adjusted_RV, chunks)
        for row, chunk in enumerate(chunks):
            sampling = chunk.request.sampling
            if sampling.logit_bias:
                ids, bias = zip(*sampling.logit_bias, strict=True)
                adjusted_RV[row, list(ids)] += torch.tensor(bias, device=adjusted_RV.device)
            if chunk.num_outputs < sampling.min_tokens and sampling.stop_ids:
                adjusted_RV[row, list(sampling.stop_ids)] = float("-inf")
        return adjusted_RV


def _is_adjusted(sampling: Sampling, num_outputs: int) -> bool:
    return bool(sampling.logit_bias) or num_outputs < sampling.min_tokens or has_penalties(sampling)


def _is_plain_greedy(sampling: Sampling, num_outputs: int) -> bool:
    return (
        sampling.temperature < _GREEDY_BELOW and sampling.logprobs is None and not _is_adjusted(sampling, num_outputs)
    )


def _first_argmax(logits_RV: torch.Tensor) -> torch.Tensor:
    """The lowest id among each row's largest logits, int64 [R]; NaN counts as largest.

    Two stages, because torch takes a maximum eight times faster than its place.
    """
    if (found_R := native_first_largest(logits_RV)) is not None:
        return found_R
    num_rows, vocab_size = logits_RV.shape
    width = next((width for width in _ARGMAX_GROUPS if vocab_size % width == 0), None)
    if width is None:
        return logits_RV.max(-1).indices
    groups = logits_RV.view(num_rows, -1, width)
    best_R = groups.amax(-1).max(-1).indices
    within_R = groups[torch.arange(num_rows, device=logits_RV.device), best_R].max(-1).indices
    return best_R * width + within_R


def _refuse_nan(logits_RV: torch.Tensor, tokens: list[int], chunks: Sequence[Chunk]) -> None:
    """A NaN wins every maximum and poisons every sum, so looking at the drawn logits finds it in any row."""
    rows = torch.arange(len(tokens), device=logits_RV.device)
    drawn = logits_RV[rows, torch.tensor(tokens, device=logits_RV.device)]
    if bool(drawn.isnan().any()):
        row = int(drawn.isnan().nonzero()[0])
        raise ArithmeticError(
            f"request {chunks[row].request.id}: the logits after {chunks[row].start + chunks[row].num_tokens} tokens "
            "are not numbers; the weights or the KV cache of this worker are damaged"
        )


class _Draws:
    """What the rows of one draw ask for, as columns [R, 1]."""

    def __init__(self, chunks: Sequence[Chunk], vocab_size: int, device: torch.device) -> None:
        samplings = [chunk.request.sampling for chunk in chunks]

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

        self.temperature = column([s.temperature for s in samplings]).float()
        self.top_p = column([s.top_p for s in samplings])
        self.min_p = column([s.min_p for s in samplings])
        self.uniform = column([uniform(chunk.request.sampling.seed, chunk.num_outputs) for chunk in chunks])
        top_k = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in samplings]
        self.top_k = torch.tensor(top_k, device=device).unsqueeze(1)
        self.is_top_k = self.top_k < vocab_size
        self.is_cut = self.is_top_k | (self.top_p < 1.0) | (self.min_p > 0.0)

    def rows(self, rows: torch.Tensor) -> _Draws:
        """The same for some rows."""
        subset = object.__new__(_Draws)
        for name, value in vars(self).items():
            setattr(subset, name, value[rows])
        return subset


def _draw(logits_RV: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
    """One token a row: the inverse of the cumulated distribution, best token first, at the row's uniform number.

    Ranks a few tokens first; rows whose answer lies beyond them are ranked whole.
    """
    vocab_size, device = logits_RV.shape[1], logits_RV.device
    draws = _Draws(chunks, vocab_size, device)
    probabilities_RV = ((logits_RV - logits_RV.amax(-1, keepdim=True)) / draws.temperature).softmax(-1)
    tokens_R = torch.zeros(len(chunks), dtype=torch.int64, device=device)
    pending_R = torch.arange(len(chunks), device=device)
    ids_RP, certain_R1 = _best(logits_RV, min(_SHORT_PREFIX, vocab_size))
    for prefix in (_SHORT_PREFIX, _LONG_PREFIX, vocab_size):
        ranked_RP = probabilities_RV[pending_R].gather(1, ids_RP[:, :prefix])
        place_R, found_R = _invert(ranked_RP.double(), certain_R1.clamp(max=prefix), draws.rows(pending_R), vocab_size)
        tokens_R[pending_R[found_R]] = ids_RP[found_R].gather(1, place_R[found_R, None]).squeeze(1)
        pending_R = pending_R[~found_R]
        if len(pending_R) == 0:
            break
        if prefix == _SHORT_PREFIX:
            ids_RP, certain_R1 = _ranked(logits_RV[pending_R])
        else:
            ids_RP, certain_R1 = ids_RP[~found_R], certain_R1[~found_R]
    return tokens_R.tolist()


def _best(logits_RV: torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the `prefix` largest logits, largest first, equal ones by id; and how many of them [R, 1] are certain.

    A top-k may take any of several equal logits at its end, so only those above its last value are certain.
    """
    if prefix == logits_RV.shape[1]:
        return _ranked(logits_RV)
    values_RP, ids_RP = logits_RV.topk(prefix, sorted=False)
    ids_RP, by_id = ids_RP.sort(-1)
    values_RP, by_value = values_RP.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    certain_R1 = (values_RP > values_RP[:, -1:]).sum(-1, keepdim=True)
    return ids_RP.gather(1, by_value), certain_R1


def _ranked(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All ids, largest logit first, equal ones by id; all are certain.

    On the CPU each float32 becomes an integer of the same order with its id below it, because numpy sorts integers
    with vector instructions: 0.2 ms for 49,152 tokens, torch's stable sort 3.
    """
    num_rows, vocab_size = logits_RV.shape
    certain_R1 = torch.full((num_rows, 1), vocab_size, device=logits_RV.device)
    if logits_RV.device.type != "cpu":
        return logits_RV.sort(dim=-1, descending=True, stable=True).indices, certain_R1
    bits = (logits_RV + 0.0).view(torch.int32)  # adding makes -0.0 the 0.0 that it equals
    ordered = bits ^ ((bits >> 31) & 0x7FFF_FFFF)
    keys = ordered.to(torch.int64).neg_().bitwise_left_shift_(32).add_(torch.arange(vocab_size)).numpy()
    keys.sort(axis=-1)
    return torch.from_numpy(keys) & 0xFFFF_FFFF, certain_R1


def _invert(
    ranked_RP: torch.Tensor, certain_R1: torch.Tensor, draws: _Draws, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rank each row draws [R], and whether the certain ranks suffice to know it [R].

    Filters apply in the order of transformers: top-k, then top-p of what top-k left, then min-p. All keep a prefix of
    the ranking. Sums are sequential in float64, so a rank's sum does not depend on how many ranks follow.
    """
    last_rank = ranked_RP.shape[1] - 1
    cumulated_RP = ranked_RP.cumsum(-1)
    rank_P = torch.arange(last_rank + 1, device=ranked_RP.device)
    after_top_k = cumulated_RP.gather(1, (draws.top_k - 1).clamp(max=last_rank))
    mass_R1 = torch.where(draws.is_top_k, after_top_k, 1.0)
    kept = (rank_P < draws.top_k) & (rank_P < certain_R1) & (ranked_RP > 0)
    kept &= (draws.top_p >= 1.0) | (cumulated_RP - ranked_RP < draws.top_p * mass_R1)
    kept &= ranked_RP >= draws.min_p * ranked_RP[:, :1]
    kept[:, 0] = True
    num_kept_R1 = kept.sum(-1, keepdim=True)
    total_R1 = torch.where(draws.is_cut, cumulated_RP.gather(1, num_kept_R1 - 1), 1.0)
    target_R1 = draws.uniform * total_R1
    place_R1 = torch.minimum((cumulated_RP <= target_R1).sum(-1, keepdim=True), num_kept_R1 - 1)
    cut_is_known = (num_kept_R1 < certain_R1) | (num_kept_R1 == draws.top_k)
    cut_is_known &= ~draws.is_top_k | (draws.top_k <= certain_R1)
    uncut_is_known = target_R1 < cumulated_RP.gather(1, (certain_R1 - 1).clamp(min=0))
    known_R1 = torch.where(draws.is_cut, cut_is_known, uncut_is_known & (certain_R1 > 0)) | (certain_R1 == vocab_size)
    return place_R1.squeeze(1), known_R1.squeeze(1)


def _logprobs(raw_V: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Of the logits as the model gave them; equal ones in `top` are ordered by id."""
    logprobs_V = raw_V.log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        least = raw_V.topk(min(num_top, raw_V.shape[0])).values[-1]
        ids = (raw_V >= least).nonzero().squeeze(1)
        ids = ids[raw_V[ids].sort(descending=True, stable=True).indices][:num_top]
        top = tuple(zip(ids.tolist(), logprobs_V[ids].tolist(), strict=True))
    return TokenLogprobs(logprob=float(logprobs_V[token]), top=top)
