"""What a Transload server tells of single requests after a run: the waterfalls of a few, chosen by what users felt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from transload.runtime.base import Waterfall
from transload.study.answers import NOT_JSON
from transload.study.http_client import ConnectFailed, ConnectionBroke, HttpClient, NotHttp, WholeAnswer
from transload.study.metrics import RequestRecord, ttft_seconds
from transload.study.waterfall import decode_waterfalls

SHARES = (0.5, 0.9, 1.0)
ASK_SECONDS = 5.0


def chosen(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """Of median, p90 and greatest TTFT and of median, p90 and greatest whole latency; each once."""
    ended = [record for record in records if record.error is None and not record.interrupted and record.token_seconds]
    if not ended:
        return []
    by_ttft = sorted(ended, key=lambda record: ttft_seconds(record) or 0.0)
    by_total = sorted(ended, key=lambda record: record.end_seconds - record.due_seconds)
    picked = [ranked[round(share * (len(ended) - 1))] for ranked in (by_ttft, by_total) for share in SHARES]
    return list({record.index: record for record in picked}.values())


async def fetch_waterfalls(
    client: HttpClient, records: Sequence[RequestRecord], *, of_all: bool = False
) -> tuple[Waterfall, ...]:
    """Of the chosen requests, or of all. () if the server is not one of ours or has forgotten them."""
    found: list[Waterfall] = []
    for record in records if of_all else chosen(records):
        if record.answer_id is None:
            continue
        answer = WholeAnswer()
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await client.exchange("GET", f"/requests/{record.answer_id}", b"", answer)
            if answer.status != 200:
                break
            found += decode_waterfalls(answer.content)
        except (TimeoutError, ConnectFailed, ConnectionBroke, NotHttp, *NOT_JSON):
            break
    return tuple(found)
