"""Takes the stored tensors of a mixture apart: from fused or packed ones to each expert's own matrices and biases.

Forms and names are in `expert_storage.py`. What is unpacked are views where no conversion is needed; experts that
nobody asked for cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from transload.model.expert_storage import MXFP4_VALUES, Form

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the three low bits of an E2M1 number mean; the fourth is the sign (OCP Microscaling Formats v1.0, table 5)."""
_SCALE_BIAS = 127
_FUSED = ".mlp.experts."

Wanted = Callable[[str], bool]


class ExpertUnpacker:
    """Is given the stored tensors of a model in any order, and gives back what can be loaded of them."""

    def __init__(self, form: Form, dtype: torch.dtype, wanted: Wanted) -> None:
        """`wanted` says of a name as loaded whether it is needed."""
        self._form = form
        self._dtype = dtype
        self._wanted = wanted
        self._halves: dict[str, torch.Tensor] = {}  # blocks whose scales have not come yet, and the other way round

    def unpack(self, name: str, stored: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors as loaded, in the model's dtype, of one that has the name `expert_storage.loaded_name` gave it."""
        prefix, fused, part = name.rpartition(_FUSED)
        if self._form == "each" or not fused:
            if self._wanted(name):
                yield name, stored.to(self._dtype)
            return
        matrix = part.removesuffix("_blocks").removesuffix("_scales")
        if matrix == part:
            yield from self._experts(prefix + fused, part, lambda expert: stored[expert], len(stored))
            return
        other = self._halves.pop(f"{prefix}{fused}{matrix}", None)
        if other is None:
            self._halves[f"{prefix}{fused}{matrix}"] = stored
            return
        blocks, scales = (stored, other) if part.endswith("_blocks") else (other, stored)
        yield from self._experts(
            prefix + fused, matrix, lambda expert: dequantised(blocks[expert], scales[expert]), len(blocks)
        )

    def _experts(
        self, prefix: str, part: str, matrix_of: Callable[[int], torch.Tensor], num_experts: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Each wanted expert's share of a fused tensor: `part` is gate_up_proj or down_proj, maybe with _bias."""
        kind = "bias" if part.endswith("_bias") else "weight"
        module = part.removesuffix("_bias")
        names = ("gate_proj", "up_proj") if module == "gate_up_proj" else (module,)
        for expert in range(num_experts):
            loaded = [f"{prefix}{expert}.{name}.{kind}" for name in names]
            if not any(map(self._wanted, loaded)):
                continue
            matrix = matrix_of(expert)
            if self._form == "interleaved" and kind == "weight":
                matrix = matrix.t()
            for name, rows in zip(loaded, self._split(matrix, len(names)), strict=True):
                yield name, rows.to(self._dtype)

    def _split(self, matrix: torch.Tensor, num_parts: int) -> tuple[torch.Tensor, ...]:
        """Gates and ups, which lie one after the other or in turn."""
        if num_parts == 1:
            return (matrix,)
        if self._form == "fused":
            return tuple(matrix.chunk(2))
        return matrix[0::2], matrix[1::2]


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 blocks uint8 [out, groups, 16] and their scales uint8 [out, groups] to float32 [out, groups * 32].

    The low half of a byte comes first. Exact in float32 and in bfloat16: a few bits and a power of two.
    """
    signed = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
    byte = torch.arange(256)
    pairs = torch.stack((signed[byte & 15], signed[byte >> 4]), -1)
    values = pairs[blocks.reshape(-1).int()].view(*scales.shape, MXFP4_VALUES)
    return torch.ldexp(values, (scales.int() - _SCALE_BIAS).unsqueeze(-1)).flatten(1)
