"""Rotary position embedding of every kind in `arch.Rope`, computed as Hugging Face transformers does.

Owns the frequencies, the tables and the rotation. Never looks at requests or the cache: it is told each row's position.

Shapes: T rows of a step, H heads (queries and keys alike), D head dimension, F = D / 2 frequencies.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from transload.arch import ModelArch, Rope

_MIN_TABLE_POSITIONS = 2048


def inverse_frequencies(arch: ModelArch, num_tokens: int = 0) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float32 [F].

    `num_tokens`, the length of the text so far, matters to dynamic NTK scaling alone.
    Formulas: `transformers.modeling_rope_utils`, there after kaiokendev (linear), bloc97 and emozilla (dynamic),
    arXiv 2309.00071 (yarn) and Meta's Llama 3.1 release (llama3).
    """
    rope, dim = arch.rope, arch.head_dim
    exponents_F = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    match rope.kind:
        case "default":
            return _powers(rope.theta, exponents_F).reciprocal()
        case "linear":
            return _powers(rope.theta, exponents_F).reciprocal() / rope.factor
        case "dynamic":
            stretch = rope.factor * max(num_tokens / arch.max_position, 1.0) - (rope.factor - 1.0)
            return _powers(rope.theta * stretch ** (dim / (dim - 2)), exponents_F).reciprocal()
        case "llama3":
            return _llama3(rope, _powers(rope.theta, exponents_F).reciprocal(), _trained_positions(arch))
        case "yarn":
            return _yarn(rope, dim, _powers(rope.theta, exponents_F), _trained_positions(arch))


def attention_scaling(rope: Rope) -> float:
    """What cosines and sines are multiplied with; 1 but for yarn (arXiv 2309.00071, section 3.4)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _powers(base: float, exponents_F: torch.Tensor) -> torch.Tensor:
    return torch.pow(base, exponents_F)


def _trained_positions(arch: ModelArch) -> int:
    return arch.rope.original_max_position or arch.max_position


def _mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1.0 else 0.1 * mscale * math.log(scale) + 1.0


def _llama3(rope: Rope, plain_F: torch.Tensor, trained: int) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    wavelength_F = 2 * math.pi / plain_F
    longest, shortest = trained / rope.low_freq_factor, trained / rope.high_freq_factor
    stretched_F = torch.where(wavelength_F > longest, plain_F / rope.factor, plain_F)
    blend_F = (trained / wavelength_F - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended_F = (1 - blend_F) * stretched_F / rope.factor + blend_F * stretched_F
    between_F = (wavelength_F >= shortest) & (wavelength_F <= longest)
    return torch.where(between_F, blended_F, stretched_F)


def _yarn(rope: Rope, dim: int, wavelengths_F: torch.Tensor, trained: int) -> torch.Tensor:
    """Dimensions that turn often are kept, those that turn rarely interpolated, with a ramp between."""

    def dimension_turning(num_rotations: float) -> float:
        return dim * math.log(trained / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp_F = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept_F = 1 - ramp_F
    return 1.0 / (rope.factor * wavelengths_F) * (1 - kept_F) + 1.0 / wavelengths_F * kept_F


class Rotation:
    """The rotations of one step's rows, and the memory for what they give, shared by all layers in turn."""

    __slots__ = ("_cos_T1D", "_high_THF", "_low_THF", "_minus_sin_T1F", "_out_THD", "_sin_T1F")

    def __init__(self, cos_T1D: torch.Tensor, sin_T1F: torch.Tensor, num_heads: int) -> None:
        num_rows, _, head_dim = cos_T1D.shape
        self._cos_T1D = cos_T1D
        self._sin_T1F = sin_T1F
        self._minus_sin_T1F = -sin_T1F
        self._out_THD = cos_T1D.new_empty(num_rows, num_heads, head_dim)
        self._low_THF, self._high_THF = self._out_THD.chunk(2, -1)

    def inputs(self) -> list[torch.Tensor]:
        """What differs from step to step."""
        return [self._cos_T1D, self._sin_T1F, self._minus_sin_T1F]

    def __call__(self, x_THD: torch.Tensor) -> torch.Tensor:
        """The rotated rows; they stay as they are until the next call."""
        low_THF, high_THF = x_THD.chunk(2, -1)
        torch.mul(x_THD, self._cos_T1D, out=self._out_THD)
        self._low_THF.addcmul_(high_THF, self._minus_sin_T1F)
        self._high_THF.addcmul_(low_THF, self._sin_T1F)
        return self._out_THD


class RotaryEmbedding:
    """Cosines and sines by position. Kept in a table that grows to the largest position asked for."""

    def __init__(self, arch: ModelArch, dtype: torch.dtype, device: torch.device) -> None:
        self._arch = arch
        self._dtype = dtype
        self._device = device
        self._scaling = attention_scaling(arch.rope)
        self._num_heads = arch.num_heads + arch.num_kv_heads
        self._by_length = arch.rope.kind == "dynamic"
        self._inverse_F = inverse_frequencies(arch)
        self._cos_PD = torch.empty(0)
        self._sin_PF = torch.empty(0)
        if not self._by_length:
            self._grow(_MIN_TABLE_POSITIONS)

    def at(self, positions_T: torch.Tensor, num_prompt_tokens_T: torch.Tensor) -> Rotation:
        """The rotations for rows at these positions (int64 [T], on the CPU).

        With dynamic NTK scaling a row's frequencies follow from the length of its text when it was first computed:
        the whole prompt for prompt rows, the row's own end after that. That is what transformers does for one prompt
        and its continuation, and it does not depend on how the prompt was cut into chunks.
        """
        if self._by_length:
            lengths_T = torch.maximum(positions_T + 1, num_prompt_tokens_T)
            return Rotation(*self._compute(positions_T, self._frequencies_for(lengths_T)), self._num_heads)
        self._reach(positions_T)
        rows_T = positions_T.to(self._device)
        return Rotation(self._cos_PD[rows_T].unsqueeze(1), self._sin_PF[rows_T].unsqueeze(1), self._num_heads)

    def angles(self, positions_T: torch.Tensor, num_prompt_tokens_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, F] of what `at` rotates by, contiguous."""
        num_frequencies = self._arch.head_dim // 2
        if self._by_length:
            lengths_T = torch.maximum(positions_T + 1, num_prompt_tokens_T)
            cos_T1D, sin_T1F = self._compute(positions_T, self._frequencies_for(lengths_T))
            return cos_T1D[:, 0, :num_frequencies].contiguous(), sin_T1F[:, 0].contiguous()
        self._reach(positions_T)
        return self._cos_PD[positions_T, :num_frequencies].contiguous(), self._sin_PF[positions_T].contiguous()

    def _reach(self, positions_T: torch.Tensor) -> None:
        largest = int(positions_T.max())
        if largest >= len(self._cos_PD):
            self._grow(1 << largest.bit_length())

    def _grow(self, num_positions: int) -> None:
        cos_P1D, sin_P1F = self._compute(torch.arange(num_positions), self._inverse_F)
        self._cos_PD, self._sin_PF = cos_P1D.squeeze(1), sin_P1F.squeeze(1)

    def _frequencies_for(self, lengths_T: torch.Tensor) -> torch.Tensor:
        """float32 [T, F]: each row's own frequencies, computed once per length that occurs."""
        unique, index_T = np.unique(lengths_T.clamp(min=self._arch.max_position).numpy(), return_inverse=True)
        table = torch.stack([inverse_frequencies(self._arch, length) for length in unique.tolist()])
        return table[torch.from_numpy(index_T)]

    def _compute(self, positions_T: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines [T, 1, D] and sines [T, 1, F] in the model's dtype. In float32 on the CPU, so that devices agree."""
        angles_TF = positions_T.to(torch.float32).unsqueeze(1) * inverse
        cos_TF = (angles_TF.cos() * self._scaling).to(self._dtype)
        sin_TF = (angles_TF.sin() * self._scaling).to(self._dtype)
        cos_T1D = torch.cat((cos_TF, cos_TF), dim=-1).unsqueeze(1)
        return cos_T1D.to(self._device), sin_TF.unsqueeze(1).to(self._device)
