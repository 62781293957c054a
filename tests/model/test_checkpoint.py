"""Weights as tensors: equal to what was saved, whatever the file; damaged files are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.model.tiny_gguf import Array, dimensions, llama_cpp_name, permuted, write_gguf
from tests.model.tiny_models import CONFIGS, saved, tiny_model
from transload.deploy.spec import ModelSpec
from transload.errors import CheckpointError
from transload.model.checkpoint import load_tensors
from transload.model.gguf_quants import PIECE_ELEMENTS, dequantised
from transload.model.inventory import expected_shapes
from transload.model.source import DEFAULT_ARCH, ModelFiles, locate


def at(path: Path, **spec: Any) -> ModelFiles:
    return locate(ModelSpec(path=str(path), **spec))


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "40KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_safetensors_folder_loads_what_transformers_saved(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(name)
    files = at(saved(model, tmp_path / "m", **how))
    assert (len(files.paths) > 1) == bool(how)
    assert_equal(load_tensors(files, torch.float32), weights_of(model))
    assert_equal(load_tensors(files, torch.bfloat16), weights_of(model.to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_in_their_own_and_in_single_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama").to(dtype)
    files = at(saved(model, tmp_path))
    assert files.stored_dtype == str(dtype).removeprefix("torch.")
    assert_equal(load_tensors(files, dtype), weights_of(model))
    assert_equal(load_tensors(files, torch.float32), weights_of(model.float()))


def test_a_second_copy_of_tied_embeddings_is_left_out(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    path = saved(model, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert_equal(load_tensors(at(tmp_path), torch.float32), weights_of(model))


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def gguf_tensors(model: Any, kind: str) -> dict[str, tuple[Array, str]]:
    """A model's tensors as llama.cpp's converter writes them: matrices in `kind`, vectors in float32."""
    config = model.config
    stored: dict[str, tuple[Array, str]] = {}
    for name, tensor in weights_of(model).items():
        values = tensor.float().numpy()
        module = name.rsplit(".", 2)[-2]
        if config.model_type in ("llama", "mistral") and module in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
            values = permuted(values, heads)
        stored[llama_cpp_name(name)] = (np.ascontiguousarray(values), kind if values.ndim == 2 else "F32")
    return stored


ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_of_each_family_gives_back_the_original_weights(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    head_dim = 32 if name in ("mistral", "qwen3") else None
    path = write_gguf(
        tmp_path / "m.gguf",
        gguf_tensors(model, "F32"),
        architecture=ARCHITECTURE[model.config.model_type],
        fill=dimensions(head_dim=head_dim),
    )
    files = at(path)
    assert files.kind == "gguf"
    assert files.stored_dtype == "float32"
    assert files.name == "m"
    from_folder = at(saved(model, tmp_path / "folder")).arch
    assert files.arch.family == ("llama" if name == "mistral" else from_folder.family)
    for field in ("vocab_size", "num_layers", "num_kv_heads", "head_dim", "tied_embeddings", "qkv_bias", "qk_norm"):
        assert getattr(files.arch, field) == getattr(from_folder, field), field
    assert_equal(load_tensors(files, torch.float32), weights_of(model))


def test_query_and_key_rows_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tiny_model("llama"), "F32"), fill=dimensions())
    read: Any = load_gguf_checkpoint
    oracle = read(str(path), return_tensors=True, model_to_load=tiny_model("llama"))["tensors"]
    assert_equal(load_tensors(at(path), torch.float32), oracle)


def blocks(kind: str, num_rows: int, num_columns: int, seed: int = 0) -> Array:
    """Quantised rows with every bit pattern in them, but finite scales."""
    random = np.random.default_rng(seed)
    if kind not in ("Q4_K", "Q6_K"):
        values = random.standard_normal((num_rows, num_columns), dtype=np.float32)
        stored: Array = gguf.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        return stored
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = random.integers(0, 256, (num_rows * num_columns // block_elements, block_bytes), dtype=np.uint8)
    for place in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        scale = random.uniform(-0.1, 0.1, len(raw)).astype(np.float16)
        raw[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw.reshape(num_rows, -1)


KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


@pytest.mark.parametrize("kind", KINDS)
def test_each_type_is_dequantised_as_the_gguf_package_does_it(kind: str, tmp_path: Path) -> None:
    hidden, inner = 256, 512
    model = {"token_embd.weight": (320, hidden), "output.weight": (320, hidden)}
    layer = {"attn_q": (hidden, hidden), "attn_k": (128, hidden), "attn_v": (128, hidden)}
    layer |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    model |= {f"blk.0.{name}.weight": shape for name, shape in (layer | {"ffn_down": (hidden, inner)}).items()}
    tensors: dict[str, tuple[Array, str]] = {name: (blocks(kind, *shape), kind) for name, shape in model.items()}
    ones = np.ones(hidden, dtype=np.float32)
    tensors |= {f"{name}.weight": (ones, "F32") for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    fill = dimensions(num_layers=1, hidden=hidden, inner=inner)
    path = write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen2", fill=fill)
    with pytest.raises(CheckpointError, match="bias"):  # a qwen2 without biases is not what its name says
        at(path)
    path = write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen3", fill=fill)
    with pytest.raises(CheckpointError, match="q_norm"):
        at(path)
    path = write_gguf(tmp_path / "m.gguf", tensors, fill=fill)
    loaded = load_tensors(at(path), torch.float32)
    for name, ours in (
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        wanted = gguf.dequantize(tensors[name][0], gguf.GGMLQuantizationType[kind])
        assert np.array_equal(loaded[ours].numpy(), wanted)
    half = load_tensors(at(path), torch.bfloat16)
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in loaded.items())


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), num_blocks=st.integers(1, 200), seed=st.integers(0, 3))
def test_dequantising_in_pieces_changes_no_bit(kind: str, num_blocks: int, seed: int) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    width = max(gguf.GGML_QUANT_SIZES[quant][0], 32)
    raw = blocks(kind, num_blocks, width, seed)
    pieces = np.concatenate(list(dequantised(raw.reshape(-1), kind)))
    assert np.array_equal(pieces, gguf.dequantize(raw, quant).reshape(-1))


def test_a_tensor_larger_than_a_piece_is_dequantised_whole() -> None:
    raw = blocks("Q8_0", 70, PIECE_ELEMENTS // 32 + 32)
    pieces = list(dequantised(raw.reshape(-1), "Q8_0"))
    assert max(piece.size for piece in pieces) <= PIECE_ELEMENTS
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    assert np.array_equal(np.concatenate(pieces), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Random weights


def test_random_weights_are_those_of_a_fresh_model(tmp_path: Path) -> None:
    saved(tiny_model("llama-biases"), tmp_path)
    files = at(tmp_path, load_format="dummy")
    tensors = load_tensors(files, torch.float32)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(files.arch)
    assert torch.equal(tensors["model.norm.weight"], torch.ones(64))
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.bias"], torch.zeros(96))
    matrix = tensors["model.embed_tokens.weight"]
    assert 0.018 < float(matrix.std()) < 0.022
    assert abs(float(matrix.mean())) < 0.001


def test_random_weights_are_the_same_each_time_and_differ_by_tensor(tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path)
    files = at(tmp_path, load_format="dummy")
    torch.manual_seed(1)
    first = load_tensors(files, torch.bfloat16)
    torch.manual_seed(2)
    assert_equal(load_tensors(files, torch.bfloat16), first)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], first["model.layers.1.mlp.up_proj.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "m")


def rewrite_header(path: Path, change: Any) -> None:
    """Replace a safetensors file's header by what `change` makes of it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = change(json.loads(raw[8 : 8 + length]))
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])


def with_entry(**keys: Any) -> Any:
    return lambda header: {**header, "model.norm.weight": {**header["model.norm.weight"], **keys}}


DAMAGES: list[tuple[str, Any, str]] = [
    ("not JSON", lambda header: b"{" * 100, "not JSON"),
    ("deeply nested", lambda header: b"[" * 100_000, "not JSON"),
    ("a list", lambda header: b"[]", "not a JSON object"),
    ("offsets beyond the end", with_entry(data_offsets=[10**12, 10**12 + 256]), "does not fit"),
    ("negative offsets", with_entry(data_offsets=[-256, 0]), "malformed"),
    ("size unlike the shape", with_entry(shape=[65]), "does not fit"),
    ("huge shape", with_entry(shape=[2**62, 2**62]), "does not fit"),
    ("odd type", with_entry(dtype="F8_E4M3"), "F8_E4M3, which is not loaded"),
    ("type that is a list", with_entry(dtype=["F32"]), "malformed"),
    ("entry that is a string", lambda header: {**header, "model.norm.weight": "x"}, "malformed"),
]


@pytest.mark.parametrize(("what", "change", "says"), DAMAGES, ids=[damage[0] for damage in DAMAGES])
def test_a_damaged_safetensors_header_is_refused(what: str, change: Any, says: str, folder: Path) -> None:
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=says) as refusal:
        at(folder)
    assert "model.safetensors" in str(refusal.value)


def test_a_safetensors_file_cut_anywhere_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            at(folder)


def test_a_huge_header_length_is_refused_before_it_is_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="claims a header"):
        at(folder)


def test_tensors_that_overlap_are_refused_when_loading(folder: Path) -> None:
    path = folder / "model.safetensors"
    rewrite_header(
        path, lambda header: {**header, "model.norm.weight": header["model.layers.0.input_layernorm.weight"]}
    )
    files = at(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_tensors(files, torch.float32)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "absent.safetensors"])
def test_an_index_that_names_other_files_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path / "m", max_shard_size="40KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        at(folder)


def test_a_file_that_changes_after_it_was_located_is_refused(folder: Path) -> None:
    files = at(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*changed after"):
        load_tensors(files, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_model_loads(dtype: torch.dtype) -> None:
    files = locate(ModelSpec())
    assert files.arch == DEFAULT_ARCH
    tensors = load_tensors(files, dtype)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(DEFAULT_ARCH)
    assert all(tensor.dtype == dtype and bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == DEFAULT_ARCH.num_parameters()
