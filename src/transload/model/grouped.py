"""A weight whose numbers stay in groups of 32 with scales of their own, as a GGUF file stores them.

Owns what such a weight looks like between a file and a layer. Never computes with it: our own kernels do, and where
they cannot, `dequantised` gives the numbers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from transload.model.native.packed import read_stored

GroupedKind = Literal["Q4_1", "Q8_0"]
GROUP_INPUTS = 32
BLOCK_BYTES: dict[GroupedKind, int] = {"Q4_1": 20, "Q8_0": 34}
"""Of a group: a scale (Q4_1: and a minimum) in float16, then 32 numbers of four or eight bits."""


class GroupedWeight(NamedTuple):
    """A matrix [num_outputs, num_inputs] in stored blocks along its inputs."""

    kind: GroupedKind
    rows: torch.Tensor  # uint8 [num_outputs, num_inputs / 32 * block bytes], contiguous

    @property
    def num_inputs(self) -> int:
        return self.rows.shape[1] // BLOCK_BYTES[self.kind] * GROUP_INPUTS

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers themselves, [num_outputs, num_inputs]."""
        numbers = torch.empty(self.rows.shape[0], self.num_inputs, dtype=dtype)
        stored = self.rows.contiguous().view(-1).numpy()
        if not read_stored(stored, self.kind, numbers):
            from transload.model.gguf_quants import dequantised  # brings the gguf package

            pieces = [torch.from_numpy(piece) for piece in dequantised(stored, self.kind)]
            numbers.copy_(torch.cat(pieces).view(numbers.shape))
        return numbers


def grouped(stored: torch.Tensor, num_inputs: int) -> GroupedWeight:
    """The weight that a loader left as bytes, uint8 [num_outputs, bytes of a row]: their number tells the kind."""
    kinds = [kind for kind, size in BLOCK_BYTES.items() if stored.shape[1] * GROUP_INPUTS == num_inputs * size]
    assert len(kinds) == 1, (stored.shape, num_inputs)
    return GroupedWeight(kinds[0], stored)


def stacked(weights: Sequence[torch.Tensor | GroupedWeight], dtype: torch.dtype) -> torch.Tensor | GroupedWeight:
    """One below the other; as numbers of `dtype` if they are not all grouped alike."""
    kinds = {weight.kind if isinstance(weight, GroupedWeight) else None for weight in weights}
    if len(kinds) == 1 and isinstance(first := weights[0], GroupedWeight):
        return GroupedWeight(first.kind, torch.cat([w.rows for w in weights if isinstance(w, GroupedWeight)]))
    plain = [weight.dequantised(dtype) if isinstance(weight, GroupedWeight) else weight for weight in weights]
    return torch.cat(plain) if len(plain) > 1 else plain[0].contiguous()
