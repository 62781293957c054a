"""How safetensors files store mixtures of experts: one by one under several names, fused, or packed as MXFP4.

Names and shapes only, no torch; `expert_tensors.py` takes the tensors apart. As loaded, every expert has its own
`mlp.experts.N.{gate,up,down}_proj`, and the router is `mlp.gate`.

Fused tensors hold all N experts of a layer. transformers keeps them like that in memory, and writes gpt-oss so:
`gate_up_proj` [N, E, 2 I] with gates at even and ups at odd columns, `down_proj` [N, I, E]. Other families it writes
one by one unless told otherwise; then `gate_up_proj` is [N, 2 I, E] with all gates first, `down_proj` [N, E, I].

MXFP4 (Open Compute Project, Microscaling Formats v1.0): 32 values of 4 bits share a scale of 8. OpenAI's gpt-oss files
have the transpose of each fused matrix as `_blocks` uint8 [N, out, in / 32, 16] and `_scales` uint8 [N, out, in / 32].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from transload.arch import ModelArch
from transload.errors import CheckpointError
from transload.model.inventory import Shape, expected_shapes, expert_of

Form = Literal["each", "fused", "interleaved", "mxfp4"]
"""Each expert by itself; fused with gates first; fused with gates and ups in turn (gpt-oss); that, packed."""
MXFP4_VALUES = 32
"""Values that share a scale."""
_MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MIXTRAL = re.compile(r"\.block_sparse_moe\.(?:experts\.(\d+)\.(w[123])|gate)\.")
_ROUTER = re.compile(r"\.mlp\.router\.")


def loaded_name(stored: str, arch: ModelArch) -> str:
    """What a tensor that holds one matrix or vector is called once loaded. Fused ones keep their name."""
    if arch.family == "mixtral":
        return _MIXTRAL.sub(
            lambda m: f".mlp.experts.{m[1]}.{_MIXTRAL_NAMES[m[2]]}." if m[1] is not None else ".mlp.gate.", stored
        )
    return _ROUTER.sub(".mlp.gate.", stored) if arch.family == "gpt_oss" else stored


def form_of(arch: ModelArch, names: Mapping[str, object]) -> Form:
    """How a file with tensors of these names stores its experts."""
    if any(name.endswith("gate_up_proj_blocks") for name in names):
        return "mxfp4"
    if arch.family == "gpt_oss":
        return "interleaved"
    return "fused" if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else "each"


def stored_shapes(arch: ModelArch, form: Form) -> dict[str, Shape]:
    """Name and shape of every tensor of the files, the names changed by `loaded_name`."""
    shapes = expected_shapes(arch)
    if form == "each" or arch.experts is None:
        return shapes
    shapes = {name: shape for name, shape in shapes.items() if expert_of(name) is None}
    for layer in range(arch.num_layers):
        if arch.is_sparse(layer):
            fused = _fused_shapes(arch, form)
            shapes |= {f"model.layers.{layer}.mlp.experts.{name}": shape for name, shape in fused.items()}
    return shapes


def check_types(arch: ModelArch, types: Mapping[str, str], where: str) -> None:
    """Refuse bytes that are not MXFP4 blocks or scales, and blocks and scales that are not bytes."""
    for name, dtype in types.items():
        packed = arch.family == "gpt_oss" and name.endswith(("_proj_blocks", "_proj_scales"))
        if packed != (dtype == "U8"):
            wanted = "U8" if packed else "a floating-point type"
            raise CheckpointError(f"{where}: tensor {name!r} has type {dtype}, wanted {wanted}; nothing else is loaded")


def _fused_shapes(arch: ModelArch, form: Form) -> dict[str, Shape]:
    """The tensors that hold all experts of one layer."""
    experts, hidden = arch.experts, arch.hidden_size
    assert experts is not None
    num_experts, inner = experts.num_experts, experts.intermediate_size
    matrices = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, Shape] = {}
    for name, (outputs, inputs) in matrices.items():
        if form == "mxfp4":
            groups = -(-inputs // MXFP4_VALUES)
            shapes[f"{name}_blocks"] = (num_experts, outputs, groups, MXFP4_VALUES // 2)
            shapes[f"{name}_scales"] = (num_experts, outputs, groups)
        elif form == "interleaved":
            shapes[name] = (num_experts, inputs, outputs)
        else:
            shapes[name] = (num_experts, outputs, inputs)
        if experts.bias:
            shapes[f"{name}_bias"] = (num_experts, outputs)
    return shapes
