"""What crosses between workers: KV cells and activations."""

from __future__ import annotations

from typing import Any

from benchmark_docs.layout import origin, table


def handoff(result: dict[str, Any]) -> str:
    copied = [figure for figure in result["figures"] if figure["transport"] != "direct"]
    rows = [
        [
            f"{figure['cell_bytes'] // 1024} KiB",
            round(figure["num_bytes"] / 1e6),
            figure["transport"],
            f"{figure['median']:.2f}",
            f"{figure['in_process']:.2f}",
            f"{figure['share_of_in_process']:.0%}",
        ]
        for figure in copied
    ]
    text = (
        "\n## Handoff\n\nKV cells of random blocks from one worker process to another on one host, checksums on both "
        "sides included, against a plain numpy copy of the same cells inside one process in the same run. GB are 10^9 "
        "bytes; medians.\n\n"
    )
    text += table(["cell", "MB", "over", "GB/s", "copy in process, GB/s", "share"], rows)
    return text + _in_place(result) + _wires(result) + origin(result)


def _in_place(result: dict[str, Any]) -> str:
    figures = [figure for figure in result["figures"] if figure["transport"] == "direct"]
    if not figures:
        return ""
    rows = [
        [
            f"{figure['cell_bytes'] // 1024} KiB",
            round(figure["num_bytes"] / 1e6),
            round(figure["known_microseconds"]),
            round(figure["microseconds"]),
        ]
        for figure in figures
    ]
    text = (
        "\nWhere prefill works in the blocks of the decode worker nothing is copied (`direct`, default on one host): "
        "microseconds from the end of the prefill until the decode worker knows, and until the prefill worker knows "
        "that it does.\n\n"
    )
    return text + table(["cell", "MB", "decode knows, us", "prefill knows, us"], rows)


def _wires(result: dict[str, Any]) -> str:
    wires = result.get("wires", [])
    if not wires:
        return ""
    rows = [
        [
            wire["wire"],
            f"{wire['delay_seconds'] * 1000:g} ms",
            round(wire["num_bytes"] / 1e6),
            f"{wire['median']:.3f}",
            "" if wire["share_of_line"] is None else f"{wire['share_of_line']:.0%}",
            "" if wire["iperf3"] is None else f"{wire['iperf3']:.3f}",
            "" if wire["share_of_iperf3"] is None else f"{wire['share_of_iperf3']:.0%}",
        ]
        for wire in wires
    ]
    text = (
        "\nTCP over loopback, and over wires between two network namespaces, cells of 64 KiB; beside it one stream of "
        "iperf3 in the same run. The delay is that of one direction.\n\n"
    )
    columns = ["wire", "delay", "MB", "GB/s", "of the line", "iperf3, GB/s", "of iperf3"]
    return text + table(columns, rows)


def hidden(result: dict[str, Any]) -> str:
    rows = [
        [
            figure["wire"],
            f"{figure['delay_seconds'] * 1000:g} ms",
            round(figure["num_bytes"] / 1e6),
            f"{figure['prefill']:.2f}",
            f"{figure['alone'] * 1000:.1f}",
            f"{figure['exposed'] * 1000:.1f}",
            f"{figure['hidden']:.0%}",
        ]
        for figure in result["figures"]
    ]
    text = (
        f"\n### Hidden behind the prefill\n\nThe KV cache of a prompt of {result['options']['prompt_tokens']:,} tokens "
        "over TCP between two network namespaces, layer by layer while it is computed. Alone: the same bytes over the "
        "same wire with nothing to hide behind; exposed: from the first token until the decode worker has verified "
        "all of it.\n\n"
    )
    columns = ["wire", "delay", "MB", "prefill, s", "alone, ms", "exposed, ms", "hidden"]
    return text + table(columns, rows) + origin(result)


def afd(result: dict[str, Any]) -> str:
    hops = [
        [
            hop["transport"],
            hop["code"],
            hop["waiting"],
            f"{hop['p50']:.1f}",
            f"{hop['p99']:.1f}",
            f"{hop['best']:.1f}",
        ]
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
    text += table(["over", "code", "waiting", "p50", "p99", "best"], hops)
    text += (
        f"\nDecode steps at {result['options']['context']} tokens of context: one worker that computes all of it, "
        "against an attention worker on one core and an FFN worker on the other. A bubble is the share of a step in "
        "which a side computes nothing; exposed hops are what attention waits beyond what the FFN worker's longer work "
        "explains.\n\n"
    )
    columns = ["setup", "micro-batches", "batch", "step, ms", "tokens/s", "of two cores"]
    text += table([*columns, "attention bubble", "FFN bubble", "exposed hops"], steps)
    return text + origin(result)
