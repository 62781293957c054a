"""Which tensors a model of an architecture has: canonical Hugging Face names and shapes. No files, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transload.arch import ModelArch
from transload.errors import CheckpointError

Shape = tuple[int, ...]
DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
"""Buffers that old files carry and that are computed anyway."""
SHOWN = 4
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def expected_shapes(arch: ModelArch) -> dict[str, Shape]:
    """Name and shape of every tensor. Tied embeddings have no `lm_head.weight`."""
    hidden = arch.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (arch.vocab_size, hidden)}
    for layer in range(arch.num_layers):
        of_layer = _attention_shapes(arch) | _feed_forward_shapes(arch, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tied_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    return shapes


def is_feed_forward(name: str) -> bool:
    """Whether a tensor belongs to a feed-forward or an expert. A mixture's router belongs to the attention side."""
    return ".mlp." in name and ".mlp.gate." not in name


def layer_of(name: str) -> int:
    """Which layer a tensor of a layer belongs to."""
    return int(name.split(".", 3)[2])


def expert_of(name: str) -> int | None:
    """Which expert of its layer a tensor belongs to; None if to no expert."""
    match = _EXPERT.search(name)
    return int(match[1]) if match is not None else None


def check_inventory(
    arch: ModelArch, found: Mapping[str, Shape], where: str, wanted: Mapping[str, Shape] | None = None
) -> None:
    """Refuse tensors that are missing, of another shape, or more than the architecture has a use for.

    `wanted` is how the file stores them, if that is not as they are loaded.
    """
    if wanted is None:
        wanted = expected_shapes(arch)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(f"{where}: {_some(missing)} missing; the download is incomplete or of another model")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(found[name])}, wanted {list(shape)} by the configuration"
            )
    unused = [name for name in found if name not in wanted and not is_ignored(name, arch)]
    if unused:
        raise CheckpointError(
            f"{where}: {_some(unused)} not part of a {arch.family} model; "
            "leaving out weights would change its text, so it is refused"
        )


def is_ignored(name: str, arch: ModelArch) -> bool:
    """Tensors that may lie in a file without being used: derived buffers, and the second name of tied embeddings."""
    return bool(DERIVED.search(name)) or (arch.tied_embeddings and name == "lm_head.weight")


def _attention_shapes(arch: ModelArch) -> dict[str, Shape]:
    hidden = arch.hidden_size
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
    }
    if arch.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (keys,)}
        shapes["self_attn.v_proj.bias"] = (keys,)
    if arch.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if arch.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (arch.head_dim,), "self_attn.k_norm.weight": (arch.head_dim,)}
    if arch.sinks:
        shapes["self_attn.sinks"] = (arch.num_heads,)
    return shapes


def _feed_forward_shapes(arch: ModelArch, layer: int) -> dict[str, Shape]:
    """A plain feed-forward, or a router and its experts one by one, whatever their file stores them as."""
    experts, hidden = arch.experts, arch.hidden_size
    if experts is None or not arch.is_sparse(layer):
        return _projections("mlp", hidden, arch.intermediate_size, biased=arch.mlp_bias)
    shapes: dict[str, Shape] = {"mlp.gate.weight": (experts.num_experts, hidden)}
    if experts.router_bias:
        shapes["mlp.gate.bias"] = (experts.num_experts,)
    for expert in range(experts.num_experts):
        shapes |= _projections(f"mlp.experts.{expert}", hidden, experts.intermediate_size, biased=experts.bias)
    return shapes


def _projections(prefix: str, hidden: int, inner: int, *, biased: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }
    if biased:
        shapes |= {f"{prefix}.gate_proj.bias": (inner,), f"{prefix}.up_proj.bias": (inner,)}
        shapes[f"{prefix}.down_proj.bias"] = (hidden,)
    return shapes


def _some(names: list[str]) -> str:
    """The first few of `names`, and the verb."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'are' if len(names) > 1 else 'is'}"
