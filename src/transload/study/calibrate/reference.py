"""How fast the machine is at the moment: two steps, measured again whenever that matters.

The speed of a machine, of a virtual one above all, changes by a tenth and more within minutes. What is measured at one
time and used at another is put right by what these two steps took at both.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from transload.hardware.measured import Reference, Slowdown
from transload.study.calibrate.probes import Probe, StepOrder

PROMPT = StepOrder(prefill=((0, 128),), repeats=4)
DECODE = StepOrder(decode=(256,) * 4, repeats=12)
ROUNDS = 2


def measure_reference(probe: Probe, rounds: int = ROUNDS) -> Reference:
    """Some seconds, in which prompts and decodes take turns."""
    prefill: list[float] = []
    decode: list[float] = []
    for _ in range(rounds):
        prefill += probe.alone_seconds(probe.measure(PROMPT))[1:]
        decode += probe.alone_seconds(probe.measure(DECODE))[1:]
    return Reference(prefill_seconds=median(prefill), decode_seconds=median(decode))


def typical(references: Sequence[Reference]) -> Reference:
    """Of a machine that was looked at more than once; of two looks their mean."""
    return Reference(
        prefill_seconds=median(each.prefill_seconds for each in references),
        decode_seconds=median(each.decode_seconds for each in references),
    )


def drift(since: Reference, now: Reference) -> Slowdown:
    """How many times as long steps take now."""
    return Slowdown(
        prefill=now.prefill_seconds / since.prefill_seconds, decode=now.decode_seconds / since.decode_seconds
    )
