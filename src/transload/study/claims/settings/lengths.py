"""Lengths of data sets that do not ship, as lognormal distributions with the moments of a published sample."""

from __future__ import annotations

import math

import msgspec


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Lognormal, cut at `most`. `mean` and `cv` are of the distribution before it is cut."""

    mean: float
    cv: float
    most: int

    def share_up_to(self, num_tokens: float) -> float:
        """Share of requests that are no longer than this."""
        if num_tokens >= self.most:
            return 1.0
        sigma = math.sqrt(math.log(1 + self.cv**2))
        middle = math.log(self.mean) - sigma**2 / 2
        return 0.5 * (1 + math.erf((math.log(num_tokens) - middle) / (sigma * math.sqrt(2))))


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    input: Spread
    output: Spread
    source: str


SHAREGPT = Lengths(
    input=Spread(mean=662.0, cv=0.74, most=2048),
    output=Spread(mean=186.0, cv=1.15, most=2048),
    source="moments of 65 consecutive requests from the middle of a measured run: LLMServe/DistServe @20a1633, "
    "simdistserve/benchmarks/alignment/data-ground-truth/opt-13b-sharegpt/distserve-300-3.exp (Apache-2.0)",
)
