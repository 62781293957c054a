"""What crosses between workers: KV cells and activations."""

from __future__ import annotations

from typing import Any

from benchmark_docs.layout import origin, table


def handoff(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{figure['cell_bytes'] // 1024} KiB",
            round(figure["num_bytes"] / 1e6),
            figure["transport"],
            f"{figure['median']:.2f}",
            f"{figure['in_process']:.2f}",
            f"{figure['share_of_in_process']:.0%}",
        ]
        for figure in result["figures"]
    ]
    text = (
        "\n## Handoff\n\nKV cells of random blocks from one worker process to another on one host, checksums on both "
        "sides included, against a plain numpy copy of the same cells inside one process in the same run. GB are 10^9 "
        "bytes; medians.\n\n"
    )
    return text + table(["cell", "MB", "over", "GB/s", "copy in process, GB/s", "share"], rows) + origin(result)


def afd(result: dict[str, Any]) -> str:
    hops = [
        [hop["transport"], hop["waiting"], f"{hop['p50']:.1f}", f"{hop['p99']:.1f}", f"{hop['best']:.1f}"]
        for hop in result["hops"]
    ]
    steps = [
        [
            figure["setup"],
            figure["micro_batches"],
            figure["batch"],
            f"{figure['step_ms']:.1f}",
            f"{figure['tokens_per_second']:.0f}",
            f"{figure['against_two_cores']:.2f}x",
            *(
                "" if figure[name] is None else f"{figure[name]:.0%}"
                for name in ("attention_bubble", "ffn_bubble", "exposed_hops")
            ),
        ]
        for figure in result["steps"]
    ]
    text = (
        "\n## Attention here, feed-forward there\n\n8 KiB there and back between two processes on two cores, in "
        "microseconds, copies included:\n\n"
    )
    text += table(["over", "waiting", "p50", "p99", "best"], hops)
    text += (
        f"\nDecode steps at {result['options']['context']} tokens of context: one worker that computes all of it, "
        "against an attention worker on one core and an FFN worker on the other. A bubble is the share of a step in "
        "which a side computes nothing; exposed hops are what attention waits beyond what the FFN worker's longer work "
        "explains.\n\n"
    )
    columns = ["setup", "micro-batches", "batch", "step, ms", "tokens/s", "of two cores"]
    text += table([*columns, "attention bubble", "FFN bubble", "exposed hops"], steps)
    return text + origin(result)
