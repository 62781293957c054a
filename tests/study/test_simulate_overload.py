"""Five times what can be served, in virtual time: those who are let in meet the targets, and nobody else waits."""

from __future__ import annotations

from transload.deploy.load import loads
from transload.study.result import Result
from transload.study.simulate import simulate
from transload.study.workload import Fixed, Poisson, Synthetic, synthetic

FILE = """\
model: {{path: llama-3.1-8b}}
pools:
  - {{name: prefill, role: prefill, chip: h100_sxm, limits: {{step_tokens: 2048}}}}
  - {{name: decode, role: decode, chip: h100_sxm, limits: {{max_batch: 64}}}}
links:
  - {{between: [prefill, decode], kind: eth400}}
router: {{local_prefill: fallback}}
targets: {{ttft: 1 s, tpot: 12 ms}}
server: {{admission: {admission}}}
"""


def run(admission: str, rate: float) -> Result:
    load = Synthetic(arrivals=Poisson(rate), input=Fixed(2000), output=Fixed(100), num_requests=300, seed=5)
    return simulate(loads(FILE.format(admission=admission)), synthetic(load))


def test_under_overload_those_who_are_let_in_meet_their_targets() -> None:
    queue, kept = run("queue", 100.0).summary, run("targets", 100.0).summary
    assert kept.num_successful > 30
    assert kept.num_good > 0.9 * kept.num_successful
    assert queue.num_good < 0.5 * queue.num_successful
    assert kept.goodput_requests_per_second > 1.3 * queue.goodput_requests_per_second


def test_without_overload_nobody_is_refused() -> None:
    kept = run("targets", 4.0)
    assert kept.num_rejected == 0
    assert kept.summary.num_successful == 300
