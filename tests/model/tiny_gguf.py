"""Writes small GGUF files with the `gguf` package's own writer, so that the reader is tested against another's work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Stored = Mapping[str, tuple[Array, str]]
"""Tensor name -> (its values in float32, or the raw bytes of its rows if quantised already; type name)."""


def write_gguf(
    path: Path,
    tensors: Stored,
    *,
    architecture: str = "llama",
    fill: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A file with these tensors, and the metadata that `fill` adds."""
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    for name, (values, kind) in tensors.items():
        quant = gguf.GGMLQuantizationType[kind]
        stored = values if values.dtype == np.uint8 else gguf.quantize(values, quant)
        writer.add_tensor(name, stored, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dimensions(
    *,
    num_layers: int = 2,
    hidden: int = 64,
    inner: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
) -> Callable[[gguf.GGUFWriter], None]:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(num_layers)
        writer.add_context_length(512)
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10_000.0)
        writer.add_rope_dimension_count(head_dim or hidden // heads)
        if head_dim is not None:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)

    return fill


LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama_cpp_name(name: str) -> str:
    """A Hugging Face tensor name in llama.cpp's spelling."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def permuted(weights: Array, heads: int) -> Array:
    """What llama.cpp's converter does to query and key rows (LlamaModel.permute in convert_hf_to_gguf.py)."""
    shape = weights.shape
    swapped = weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2)
    return swapped.reshape(shape)


def vocabulary(
    writer: gguf.GGUFWriter,
    tokens: Sequence[str],
    types: Sequence[int],
    *,
    model: str = "gpt2",
    pre: str | None = "smollm",
    merges: Sequence[str] = (),
    scores: Sequence[float] | None = None,
) -> None:
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    if merges:
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(list(scores))
