"""Calibrates whatever answers at an address: what users feel at a few lengths and a few users at once, as steps.

Cruder than measuring the machine: the network is part of the prompt's time, and how the server forms batches is taken
to be the plain way, all requests in one step.
"""

from __future__ import annotations

from datetime import UTC, datetime
from statistics import median

from transload import __version__
from transload.errors import TransloadError
from transload.hardware.measured import UNKNOWN, DecodePoint, MeasuredSteps, PrefillPoint
from transload.study.calibrate.effort import Effort, Say
from transload.study.calibrate.server import Played, play
from transload.study.metrics import tpot_seconds, ttft_seconds
from transload.study.workload import ClosedLoop, Fixed, Synthetic, synthetic

PROMPTS = (32, 128, 512, 1024)
USERS = (1, 2, 4, 8, 16)
SHORT, LONG = 64, 768
KV_TOKENS = 2**20
"""Nobody tells an outsider how much the cache holds: taken to be enough."""


def calibrate_endpoint(url: str, effort: Effort, say: Say, *, command: str, api_key: str | None) -> MeasuredSteps:
    """Raises `TransloadError` if nothing answers there, or not as it should."""
    prompts = PROMPTS[: 2 if effort.quick else None]
    users = USERS[: 2 if effort.quick else None]
    requests = effort.single_requests

    def loop(concurrency: int, num_input: int, num_output: int, num_requests: int) -> Played:
        seed = concurrency * 10_007 + num_input * 101 + num_output  # no prompt comes twice
        return play(
            url,
            synthetic(
                Synthetic(
                    arrivals=ClosedLoop(concurrency),
                    input=Fixed(num_input),
                    output=Fixed(num_output),
                    num_requests=num_requests,
                    seed=seed,
                )
            ),
            api_key=api_key,
        )

    loop(1, 16, 4, 1)  # first uses
    prefill: list[PrefillPoint] = []
    for tokens in prompts:
        seconds = _median([ttft_seconds(record) for record in loop(1, tokens, 2, requests).records])
        prefill.append(PrefillPoint(tokens=tokens, seconds=seconds))
        say(f"  a prompt of {tokens}: {seconds * 1e3:.1f} ms to the first token")
    decode: list[DecodePoint] = []
    output = 16 if effort.quick else 64
    for count in users:
        low, high = (
            _median([tpot_seconds(record) for record in loop(count, length, output, count * 3).records])
            for length in (SHORT, LONG)
        )
        each = max(0.0, (high - low) / (count * (LONG - SHORT)))
        decode.append(
            DecodePoint(
                requests=count,
                fixed_seconds=max(0.0, low - each * count * (SHORT + output / 2)),
                context_token_seconds=each,
            )
        )
        say(f"  {count} at once: {low * 1e3:.1f} ms a token at a context of {SHORT}, {high * 1e3:.1f} ms at {LONG}")
    return MeasuredSteps(
        model=loop(1, 16, 4, 1).model,
        dtype=UNKNOWN,
        machine=f"whatever answers at {url}",
        date=datetime.now(UTC).date().isoformat(),
        by=f"transload {__version__}: {command}",
        num_cores=1,
        kv_tokens=KV_TOKENS,
        kv_bytes_per_token=1,
        prefill=tuple(prefill),
        decode=tuple(decode),
    )


def _median(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    if not known:
        raise TransloadError("the endpoint streams too few tokens to measure by; is streaming supported?")
    return median(known)
