"""Which number format a device computes in at speed. Owns that choice only; imports torch for CUDA alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

DtypeName = Literal["float32", "bfloat16"]

_NATIVE_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm


def default_dtype(device: str) -> DtypeName:
    """bfloat16 where `device` multiplies it natively, else float32.

    A CPU without such instructions emulates bfloat16 slower than it computes float32. A CPU whose features cannot be
    read counts as one without.
    """
    if device.startswith("cuda"):
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _NATIVE_BF16_FLAGS & _cpu_flags(Path("/proc/cpuinfo")) else "float32"


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """The feature words of the first core; none if the kernel does not say."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, words = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(words.split())
    return frozenset()
