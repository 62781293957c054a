"""When a request that comes now would have its first token. Pure arithmetic on what workers have said of themselves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transload.control.views import WorkerView


def first_token_seconds(
    num_prompt_tokens: int, queued_tokens: Sequence[int], views: Collection[WorkerView], seconds_between: float
) -> float:
    """Seconds until the first token of a prompt that waits behind `queued_tokens`, prompts that no worker has taken.

    What is to be computed before it, dealt out to all who prefill; or, where requests wait for a place to decode, as
    long as it takes for so many to be served; and then its own. 0 if there is nobody to serve it.
    """
    prefilling = [view for view in views if view.role == "prefill"] or list(views)
    if not prefilling:
        return 0.0
    rates = [view.prefill_rate for view in prefilling]
    each = sum(rate.seconds_per_unit for rate in rates) / len(rates)
    tokens = sum(queued_tokens) + sum(sum(view.prefill_tokens.values()) for view in prefilling)
    before = tokens * each / len(prefilling)
    if queued_tokens:
        before = max(before, (len(queued_tokens) + 1) * seconds_between)
    return before + min(rate.seconds(num_prompt_tokens) for rate in rates)
