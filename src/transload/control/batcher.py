"""Which tokens make the next step: running requests first, then prompts in order, under one token budget.

A step costs what its tokens cost, so the budget bounds how long a running stream can be kept waiting by somebody
else's prompt: a long prompt is prefilled in chunks, each beside the decodes of that moment.
"""

from __future__ import annotations

from collections.abc import Iterable

from transload.control.work import Work


def plan_chunks(
    decoding: Iterable[Work], prefilling: Iterable[Work], *, step_tokens: int, block_size: int
) -> list[tuple[Work, int]]:
    """Pairs (work, number of tokens) of the next step.

    Every decoding request gets its one token, whatever the budget. Prompts share what is left (a block at least, so
    that they get on), first come first served. A chunk that does not end its prompt is cut at a block border, so that
    whole blocks can leave for another worker.
    """
    chunks = [(work, 1) for work in decoding]
    budget = max(step_tokens - len(chunks), block_size)
    for work in prefilling:
        remaining = work.num_known - work.num_computed
        num_tokens = min(remaining, budget)
        if num_tokens < remaining:
            num_tokens = (work.num_computed + num_tokens) // block_size * block_size - work.num_computed
        if num_tokens <= 0:
            break
        chunks.append((work, num_tokens))
        budget -= num_tokens
    return chunks
