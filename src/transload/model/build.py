"""From named tensors to a model: fuses projections, packs weights, frees the originals.

Never reads or checks a file: `checkpoint.load_tensors` has shown that every tensor is there. Attention layers and
feed-forwards are built by separate functions, so that a worker can hold one side only.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import msgspec
import torch

from transload.arch import ModelArch
from transload.model.experts import ExpertLayer, Router
from transload.model.grouped import GroupedWeight, grouped, stacked
from transload.model.linear import Linear, TileProof
from transload.model.llama import (
    Activation,
    AttentionLayer,
    AttentionSide,
    FeedForward,
    FeedForwardLayer,
    LlamaModel,
    RmsNorm,
    clamped_swiglu,
    steady_swiglu,
    swiglu,
)
from transload.model.native.library import load
from transload.model.native.packed import Arena

Tensors = MutableMapping[str, torch.Tensor]


def build_model(
    arch: ModelArch, tensors: Tensors, dtype: torch.dtype, deterministic: bool, device: torch.device
) -> LlamaModel:
    """The whole model on `device`, in `dtype`.

    Takes each tensor out of `tensors` as it is used, so the peak is the model plus one layer. Raises `MachineError` if
    deterministic mode cannot be kept on this machine.
    """
    feed_forwards = build_feed_forwards(arch, tensors, dtype, deterministic, device)
    model = build_attention_model(arch, tensors, dtype, deterministic, device)
    model.feed_forwards = feed_forwards
    assert not tensors, sorted(tensors)
    return model


def build_attention_model(
    arch: ModelArch, tensors: Tensors, dtype: torch.dtype, deterministic: bool, device: torch.device
) -> LlamaModel:
    """The same without feed-forwards, whose tensors need not be there."""
    with torch.inference_mode():
        weights = WeightSource(arch, tensors, dtype, device, TileProof() if deterministic else None)
        attention = build_attention_side(weights)
    return LlamaModel(arch, dtype, attention, (), deterministic=deterministic, device=device)


def build_feed_forwards(
    arch: ModelArch, tensors: Tensors, dtype: torch.dtype, deterministic: bool, device: torch.device
) -> list[FeedForwardLayer]:
    """The feed-forwards of all layers; no other tensors need to be there. Their memory is theirs alone, so that it is
    given back with them."""
    with torch.inference_mode():
        weights = WeightSource(arch, tensors, dtype, device, TileProof() if deterministic else None)
        return [build_feed_forward(weights, layer) for layer in range(arch.num_layers)]


def column_part(arch: ModelArch, tensors: Tensors, part: int, num_parts: int) -> tuple[ModelArch, Tensors]:
    """One of `num_parts` slices of the inner columns of every feed-forward, as a narrower model's. The parts' outputs
    add up to the whole's."""
    inner = arch.intermediate_size // num_parts
    low = part * inner
    sliced: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            sliced[name] = tensor[:, low : low + inner].contiguous()
        elif name.endswith("down_proj.bias"):
            sliced[name] = tensor if part == 0 else torch.zeros_like(tensor)
        else:
            sliced[name] = tensor[low : low + inner]
    return msgspec.structs.replace(arch, intermediate_size=inner), sliced


class WeightSource:
    """Hands out the tensors by name, checked, in the model's dtype and on its device."""

    def __init__(
        self, arch: ModelArch, tensors: Tensors, dtype: torch.dtype, device: torch.device, proof: TileProof | None
    ) -> None:
        self.arch = arch
        self.proof = proof
        library = load() if proof is None and device.type == "cpu" else None
        self._arena = Arena(library) if library is not None else None
        self._tensors = tensors
        self._dtype = dtype
        self._device = device

    def take(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self._tensors.pop(name)
        assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
        return tensor.to(device=self._device, dtype=self._dtype)

    def matrix(self, name: str, num_outputs: int, num_inputs: int) -> torch.Tensor | GroupedWeight:
        """A weight, which the loader may have left as the file stores it."""
        if self._tensors[name].dtype != torch.uint8:
            return self.take(name, num_outputs, num_inputs)
        stored = self._tensors.pop(name)
        assert len(stored) == num_outputs, (name, tuple(stored.shape), num_outputs)
        return grouped(stored, num_inputs)

    def norm(self, name: str, size: int) -> RmsNorm:
        return RmsNorm(self.take(name, size), self.arch.norm_eps)

    def fused(self, prefix: str, outputs: dict[str, int], inputs: int, *, biased: bool, gated: bool = False) -> Linear:
        """The projections `prefix.<name>`, stacked in the order given. `gated`: two that meet element by element."""
        weight = [self.matrix(f"{prefix}.{name}.weight", size, inputs) for name, size in outputs.items()]
        bias = [self.take(f"{prefix}.{name}.bias", size) for name, size in outputs.items()] if biased else []
        split = sum(outputs.values()) // 2 if gated else 0
        return self.linear(stacked(weight, self._dtype), torch.cat(bias) if bias else None, split)

    def linear(self, weight: torch.Tensor | GroupedWeight, bias: torch.Tensor | None = None, split: int = 0) -> Linear:
        return Linear(weight, bias, self.proof, split=split, arena=self._arena, dtype=self._dtype)

    def embedding(self) -> tuple[torch.Tensor | None, Linear]:
        """The embedding, or None if the head holds it; and the head."""
        arch = self.arch
        shape = (arch.vocab_size, arch.hidden_size)
        embedding = self.matrix("model.embed_tokens.weight", *shape)
        head = self.linear(embedding if arch.tied_embeddings else self.matrix("lm_head.weight", *shape))
        if arch.tied_embeddings and head.packed is not None:
            return None, head
        if isinstance(embedding, GroupedWeight):
            embedding = embedding.dequantised(self._dtype)
        return embedding.contiguous(), head


def build_attention_side(weights: WeightSource) -> AttentionSide:
    """Embedding, attention layers, final norm and head."""
    arch = weights.arch
    embedding, head = weights.embedding()
    layers = [build_attention_layer(weights, layer) for layer in range(arch.num_layers)]
    final_norm = weights.norm("model.norm.weight", arch.hidden_size)
    return AttentionSide(embedding, layers, final_norm, head)


def build_attention_layer(weights: WeightSource, layer: int) -> AttentionLayer:
    arch, prefix = weights.arch, f"model.layers.{layer}"
    kv_size = arch.num_kv_heads * arch.head_dim
    query_size = arch.num_heads * arch.head_dim
    projections = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
    attention = f"{prefix}.self_attn"
    return AttentionLayer(
        arch,
        input_norm=weights.norm(f"{prefix}.input_layernorm.weight", arch.hidden_size),
        qkv=weights.fused(attention, projections, arch.hidden_size, biased=arch.qkv_bias),
        query_norm=weights.norm(f"{attention}.q_norm.weight", arch.head_dim) if arch.qk_norm else None,
        key_norm=weights.norm(f"{attention}.k_norm.weight", arch.head_dim) if arch.qk_norm else None,
        output=weights.fused(attention, {"o_proj": arch.hidden_size}, query_size, biased=arch.output_bias),
        sinks=weights.take(f"{attention}.sinks", arch.num_heads) if arch.sinks else None,
        ffn_norm=weights.norm(f"{prefix}.post_attention_layernorm.weight", arch.hidden_size),
        router=build_router(weights, layer) if arch.is_sparse(layer) else None,
    )


def build_router(weights: WeightSource, layer: int) -> Router:
    """What chooses the experts of a layer that is a mixture: on the attention side."""
    arch, experts = weights.arch, weights.arch.experts
    assert experts is not None
    outputs = {"gate": experts.num_experts}
    prefix = f"model.layers.{layer}.mlp"
    return Router(weights.fused(prefix, outputs, arch.hidden_size, biased=experts.router_bias), experts)


def build_feed_forward(weights: WeightSource, layer: int, experts: Iterable[int] | None = None) -> FeedForwardLayer:
    """A layer's feed-forward; of a mixture `experts` alone (None: all of them), whose tensors alone must be there."""
    if not weights.arch.is_sparse(layer):
        return _plain_feed_forward(weights, layer)
    return build_experts(weights, layer, experts)


def build_experts(weights: WeightSource, layer: int, experts: Iterable[int] | None = None) -> ExpertLayer:
    """Some experts of a layer that is a mixture; None: all of them."""
    arch, mixture = weights.arch, weights.arch.experts
    assert mixture is not None
    assert arch.is_sparse(layer), layer
    activation = clamped_swiglu(mixture.clamped) if mixture.clamped is not None else _swiglu(weights)
    built = {}
    for expert in range(mixture.num_experts) if experts is None else experts:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        size = mixture.intermediate_size
        built[expert] = _feed_forward(weights, prefix, size, activation, biased=mixture.bias)
    return ExpertLayer(built)


def _plain_feed_forward(weights: WeightSource, layer: int) -> FeedForward:
    arch = weights.arch
    prefix = f"model.layers.{layer}.mlp"
    return _feed_forward(weights, prefix, arch.intermediate_size, _swiglu(weights), biased=arch.mlp_bias)


def _swiglu(weights: WeightSource) -> Activation:
    return swiglu if weights.proof is None else steady_swiglu


def _feed_forward(
    weights: WeightSource, prefix: str, size: int, activation: Activation, *, biased: bool
) -> FeedForward:
    hidden = weights.arch.hidden_size
    gate_up = weights.fused(prefix, {"gate_proj": size, "up_proj": size}, hidden, biased=biased, gated=True)
    down = weights.fused(prefix, {"down_proj": hidden}, size, biased=biased)
    return FeedForward(gate_up, down, activation)
