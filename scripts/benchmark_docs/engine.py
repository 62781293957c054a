"""Steps of the engine alone, on CPU cores and on one GPU."""

from __future__ import annotations

from typing import Any

from benchmark_docs.layout import origin, table


def engine(result: dict[str, Any]) -> str:
    names = list(
        dict.fromkeys(name for run in result["runs"] for row in run["rows"] for name in row["tokens_per_second"])
    )
    rows: list[list[object]] = []
    left_out: dict[str, str] = {}
    for run in result["runs"]:
        left_out |= run["left_out"]
        for row in run["rows"]:
            rates = row["tokens_per_second"]
            times = ", ".join(
                f"{ratio:.2f}x {pair.partition(' / ')[2]}" for pair, ratio in row.get("times", {}).items()
            )
            share = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
            cells = [f"{rates[name]:,.0f}" if name in rates else "" for name in names]
            rows.append([run["threads"], row["case"], *cells, times, share])
    text = (
        "\n## Engine\n\nTokens/s in process, SmolLM2-135M in bfloat16, *quantized* as its file stores it (what goes "
        f"through torch in {result['torch_dtype']}): a prompt of so many tokens, or a batch that decodes at a context "
        "of 256. Each peer is compared with ours of the same weights (Q4_0 with quantized). Best of "
        f"{result['rounds']} rounds in which all took turns on the same cores. "
        f"Our kernels: {result['kernels']}. The limit of a prefill is the rate of a product of two 2048 x 2048 "
        "matrices, in bfloat16 or float32, whichever torch is faster in.\n\n"
    )
    missing = "".join(f"\n{name} is left out: {problem}\n" for name, problem in left_out.items())
    columns = ["threads", "case", *names, "times a peer", "of the limit (bfloat16)"]
    return text + table(columns, rows) + missing + origin(result)


def gpu(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for row in result["rows"]:
        what = f"decode, batch {row['num_decode']}" if row["num_decode"] else "prefill"
        times = f"{row['times_transformers']:.2f}x" if "times_transformers" in row else ""
        rate = f"{row['tokens_per_second']:,.0f}"
        rows.append([what, row["tokens"], rate, f"{1e3 * row['seconds']:.2f}", f"{row['share_of_limit']:.0%}", times])
    limits = result["limits"]
    copy, product = limits["copy_bytes_per_second"] / 1e12, limits["gemm_flops_per_second"] / 1e12
    peer = result["versions"].get("transformers", "version not recorded")
    text = (
        f"\n## One GPU: {result['device']}, {result['shape']} shape\n\nWhole steps of the engine in bfloat16 with "
        "random weights, sampling included. The limit is the larger of reading weights and keys once at the rate of a "
        f"large copy ({copy:.2f} TB/s) and the layers' FLOPs at that of a large product ({product:.0f} TFLOP/s), "
        f"both measured in the same run; beside it transformers ({peer}) doing the same steps.\n\n"
    )
    columns = ["step", "tokens of context", "tokens/s", "ms a step", "of the limit", "times transformers"]
    return text + table(columns, rows) + origin(result)


def gpu_serving(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for row in result["rows"]:
        times = f"{row['times_step']:.2f}" if "times_step" in row else ""
        figures = [row[key] for key in ("ttft_ms", "tpot_ms", "itl_p99_ms", "tokens_per_second")]
        rows.append([row["topology"], row["callers"], *figures, row.get("step_ms", ""), times])
    failed = sum(row["failed"] for row in result["rows"])
    text = (
        f"\n## Serving on one GPU: {result['device']}, {result['shape']} shape\n\nAlways so many callers at once, "
        f"{result['input_tokens']} tokens in and {result['output_tokens']} out, random weights in bfloat16; the load "
        "generator on the same machine. 1p1d shares the device between a prefill and a decode worker, which shows that "
        "every byte crosses and what a prompt does to streams, not what two devices would give. The step is the "
        "engine's own decode of that batch at the median context, in the same run: what is above 1 is prefills beside "
        f"decodes, messages and the front end. {failed} requests failed.\n\n"
    )
    columns = ["", "callers", "TTFT p50 ms", "TPOT p50 ms", "gap p99 ms", "tokens/s", "step ms", "TPOT of step"]
    return text + table(columns, rows) + origin(result)
