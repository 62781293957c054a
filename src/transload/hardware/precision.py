"""How many bytes a number takes in each format, and which part of a model is stored in which.

Formats with a shared scale count it: a 4-bit format is not half a byte.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from transload.errors import DeploymentError
from transload.hardware.nearest import did_you_mean

DType = Literal["float32", "bfloat16", "float16", "fp8", "int8", "mxfp4", "nvfp4", "int4"]

DTYPE_BYTES: dict[DType, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
    "int4": 0.5 + 2.5 / 128,
}
"""Bytes per element, shared scales included. mxfp4: one 8-bit scale per 32 elements (OCP Microscaling Formats v1.0,
section 5.2). nvfp4: one 8-bit scale per 16 (NVIDIA, "Introducing NVFP4"). int4: a 16-bit scale and a 4-bit zero point
per group of 128, as GPTQ and AWQ checkpoints have by default. fp8 and int8: scales per tensor, channel or 128 x 128
block, under 0.1 % and left out."""
SHORT_NAMES: dict[str, DType] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "float8_e4m3fn": "fp8",
    "fp8_e4m3": "fp8",
    "fp4": "nvfp4",
}


class Precision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Storage format by part of a model. Norms, biases and routers stay in that of the embeddings."""

    attention: DType = "bfloat16"
    dense_ffn: DType = "bfloat16"
    experts: DType = "bfloat16"
    """Routed and shared experts."""
    embeddings: DType = "bfloat16"
    """Input embedding and output head."""
    kv: DType = "bfloat16"


def parse_dtype(text: str) -> DType:
    """`bf16` or `bfloat16` to the name used here. Raises `DeploymentError`."""
    word = text.strip().lower().removeprefix("torch.")
    if word in SHORT_NAMES:
        return SHORT_NAMES[word]
    for name in DTYPE_BYTES:
        if word == name:
            return name
    known = [*DTYPE_BYTES, *SHORT_NAMES]
    raise DeploymentError(f"no such number format: {text}{did_you_mean(word, known)}; there are: {', '.join(known)}")


def with_weights(precision: Precision, weights: DType) -> Precision:
    """All matrices of the layers in one format, as a quantised checkpoint has them; embeddings and KV as they were.

    With a 16- or 32-bit format the embeddings take it too.
    """
    embeddings = weights if DTYPE_BYTES[weights] >= 2 else precision.embeddings
    return msgspec.structs.replace(
        precision, attention=weights, dense_ffn=weights, experts=weights, embeddings=embeddings
    )


def with_kv(precision: Precision, kv: DType) -> Precision:
    """The same with another format of the KV cache."""
    return msgspec.structs.replace(precision, kv=kv)
