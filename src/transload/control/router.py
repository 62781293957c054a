"""Which workers a request goes to, in estimated seconds, and why.

First the decode worker; then whether it prefills itself or who does it for it. A prefill on a decode worker holds up
every stream running there, so it is charged once more for each of them, and for one at least: a decode worker is kept
free for decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from transload.control.messages import Request, WorkerId
from transload.control.rates import LinkRate
from transload.control.views import WorkerView

Policy = Literal["estimate", "round_robin", "least_loaded"]
LocalPrefill = Literal["auto", "fallback", "always"]
FRAMES_PER_CHUNK = 6
"""Into how many frames a chunk's KV is cut about: only the last one is not hidden behind the computing."""


class Decision(NamedTuple):
    """Decode on `decode`; prefill on `prefill` or, if None, on the decode worker itself."""

    decode: WorkerId
    prefill: WorkerId | None
    reason: str


def most_tokens(request: Request) -> int:
    """How many tokens have keys and values when the request ends at its longest: the last one drawn has none."""
    return request.num_prompt_tokens + request.max_tokens - 1


def expected_tokens(request: Request, num_known: int, expected_outputs: float) -> int:
    """How many tokens the request will have when it ends, as far as can be told."""
    remaining = request.max_tokens - (num_known - request.num_prompt_tokens)
    return num_known + int(min(remaining, expected_outputs))


def uncached_tokens(
    request: Request, num_known: int, prefill: WorkerView, decode: WorkerView, link: LinkRate | None
) -> int:
    """How many tokens the prefill worker has to compute for that decode worker."""
    cache = decode if link is not None and link.is_in_place else prefill
    return num_known - cache.num_cached_tokens(request.block_keys)


class Router:
    """Chooses workers. Holds nothing but the turn of `round_robin`."""

    def __init__(self, policy: Policy, local_prefill: LocalPrefill, tpot_seconds: float | None = None) -> None:
        self._policy = policy
        self._tpot_seconds = tpot_seconds
        self._local_prefill = local_prefill
        self._turn = 0

    def choose(
        self,
        request: Request,
        num_known: int,
        expected_outputs: float,
        views: Sequence[WorkerView],
        links: Mapping[tuple[WorkerId, WorkerId], LinkRate],
        *,
        avoid_handoff: bool = False,
    ) -> Decision | None:
        """None: no worker has room now. `num_known` counts prompt and outputs so far; `links` holds the pairs of
        workers that can exchange KV; `avoid_handoff` after transfers of this request have failed."""
        decision = self._decide(request, num_known, expected_outputs, views, links, avoid_handoff)
        self._turn += decision is not None  # whoever waits is asked again and again, and takes no turn by that
        return decision

    def _decide(
        self,
        request: Request,
        num_known: int,
        expected_outputs: float,
        views: Sequence[WorkerView],
        links: Mapping[tuple[WorkerId, WorkerId], LinkRate],
        avoid_handoff: bool,
    ) -> Decision | None:
        prefill_pool = [view for view in views if view.role == "prefill"]
        decode_pool = self._able_to_decode(request, views)
        num_tokens = expected_tokens(request, num_known, expected_outputs)
        candidates = [view for view in decode_pool if view.has_room(num_tokens) and view.keeps_pace(self._tpot_seconds)]
        if not candidates:
            return None
        decode = self._pick_decode(request, num_known, expected_outputs, candidates)
        if decode.role != "decode":
            why = "aggregated" if decode.role == "aggregated" else "no decode worker can: runs on a prefill worker"
            return Decision(decode.worker, None, why)
        linked = [view for view in prefill_pool if (view.worker, decode.worker) in links and view.holds(num_known)]
        if not linked:
            return Decision(decode.worker, None, "no prefill worker is left: the decode worker prefills")
        if self._local_prefill == "always":
            return Decision(decode.worker, None, "local prefill is set to always")
        if avoid_handoff:
            return Decision(decode.worker, None, "transfers of this request have failed: the decode worker prefills")
        return self._split(request, num_known, decode, linked, links)

    def why_never(self, request: Request, views: Sequence[WorkerView]) -> str | None:
        """Why none of these workers can ever run the request, or None if one can or there is none."""
        wanted = most_tokens(request)
        for view in views:
            if view.holds(wanted):
                return None
        if not views:
            return None
        most = max(view.num_blocks * view.block_size for view in views)
        return f"needs {wanted} tokens of KV cache; no worker holds more than {most}"

    @staticmethod
    def _able_to_decode(request: Request, views: Sequence[WorkerView]) -> list[WorkerView]:
        """Prefill workers decode only when there is nobody else who can."""
        wanted = most_tokens(request)
        able = [view for view in views if view.holds(wanted)]
        return [view for view in able if view.role != "prefill"] or able

    def _pick_decode(
        self, request: Request, num_known: int, expected_outputs: float, candidates: Sequence[WorkerView]
    ) -> WorkerView:
        match self._policy:
            case "round_robin":
                return candidates[self._turn % len(candidates)]
            case "least_loaded":
                return min(candidates, key=lambda view: len(view.committed_blocks))
            case "estimate":

                def seconds(view: WorkerView) -> float:
                    decoding = expected_outputs * view.decode_rate.seconds(len(view.committed_blocks) + 1)
                    uncached = num_known - view.num_cached_tokens(request.block_keys)
                    prefilling = view.prefill_rate.seconds_per_unit * uncached + view.queue_seconds()
                    return decoding + prefilling

                return min(candidates, key=seconds)

    def _split(
        self,
        request: Request,
        num_known: int,
        decode: WorkerView,
        linked: Sequence[WorkerView],
        links: Mapping[tuple[WorkerId, WorkerId], LinkRate],
    ) -> Decision | None:
        able = [view for view in linked if view.has_room(num_known)]
        if not able:
            return None
        cached = decode.num_cached_tokens(request.block_keys)

        def remote_seconds(view: WorkerView) -> float:
            link = links[view.worker, decode.worker]
            compute = view.prefill_rate.seconds(max(1, uncached_tokens(request, num_known, view, decode, link)))
            wire = link.seconds((num_known - cached) * decode.kv_bytes_per_token)
            exposed = max(wire - compute, wire / FRAMES_PER_CHUNK)
            return view.queue_seconds() + compute + exposed

        match self._policy:
            case "round_robin":
                prefill = able[self._turn % len(able)]
            case "least_loaded":
                prefill = min(able, key=lambda view: sum(view.prefill_tokens.values()))
            case "estimate":
                prefill = min(able, key=remote_seconds)
        remote = remote_seconds(prefill)
        if self._local_prefill == "fallback":
            return Decision(decode.worker, prefill.worker, f"remote prefill, estimated {remote:.3f} s")
        disturbed = max(1, len(decode.committed_blocks))
        compute = decode.prefill_rate.seconds(max(1, num_known - cached))
        local = decode.queue_seconds() + compute * (1 + disturbed)
        if local < remote:
            return Decision(decode.worker, None, f"local prefill, estimated {local:.3f} s; remote {remote:.3f} s")
        slowed = f"{disturbed} stream{'s' if disturbed > 1 else ''}"
        reason = f"remote prefill, estimated {remote:.3f} s; local {local:.3f} s, {slowed} slowed down"
        return Decision(decode.worker, prefill.worker, reason)
