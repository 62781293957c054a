"""Model files changed at random: each is loaded, or refused as a damaged checkpoint. Nothing in them is run."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.model.tiny_gguf import dimensions, vocabulary, write_gguf
from tests.model.tiny_models import saved, tiny_model
from tests.model.tiny_tokenizers import byte_level, saved_tokenizer
from tests.mutations import EXTREMES, mutations
from transload.deploy.spec import ModelSpec
from transload.errors import CheckpointError, DeploymentError, RequestError
from transload.model.checkpoint import load_tensors
from transload.model.source import locate
from transload.model.tokenizer import load_tokenizer

MOST_BYTES = 64 << 20
"""That a refused file may make the loader take; each of these files is far smaller."""


def load_whole(path: Path) -> bool:
    """Everything that is done with a model's files; whether they were taken."""
    try:
        files = locate(ModelSpec(path=str(path)))
        tokenizer = load_tokenizer(files)
        with contextlib.suppress(RequestError):  # a token that the model has no row for
            tokenizer.encode("The quick brown fox")
        load_tensors(files, torch.float32)
    except (CheckpointError, DeploymentError):
        return False
    return True


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole model with its vocabulary and a chat template."""
    random = np.random.default_rng(0)
    layer = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)}
    layer |= {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (320, 64), "output_norm.weight": (64,)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    raw = json.loads(byte_level().to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].__getitem__)[:320]
    kept = set(tokens)
    merges = [f"{a} {b}" for a, b in raw["merges"] if {a, b, a + b} <= kept]

    def fill(writer: gguf.GGUFWriter) -> None:
        dimensions(num_layers=1)(writer)
        vocabulary(writer, tokens, [1] * len(tokens), merges=merges)
        writer.add_bos_token_id(0)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    tensors = {
        name: (random.standard_normal(shape, dtype=np.float32), "Q8_0" if len(shape) == 2 else "F32")
        for name, shape in shapes.items()
    }
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tensors, fill=fill)
    assert load_whole(path)
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_gguf_file_is_loaded_or_refused(seed: int, gguf_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    header_end = gguf_bytes.index(b"output_norm.weight") + 1000
    tracemalloc.start()
    try:
        for damaged in mutations(gguf_bytes[:header_end], seed, 60):
            path.write_bytes(damaged + gguf_bytes[header_end:])
            load_whole(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def folder_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = saved(tiny_model("llama"), tmp_path_factory.mktemp("folder"))
    saved_tokenizer(byte_level(), folder, eos_token="<|end|>", chat_template="{{ messages[0].content }}")
    assert load_whole(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: dict[str, bytes], **changed: bytes) -> Path:
    for name, raw in (files | {key.replace("__", "."): value for key, value in changed.items()}).items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize(
    ("name", "count"), [("config.json", 120), ("tokenizer_config.json", 60), ("generation_config.json", 40)]
)
def test_a_changed_configuration_is_loaded_or_refused(
    name: str, count: int, folder_files: dict[str, bytes], tmp_path: Path
) -> None:
    write(tmp_path, folder_files)
    for damaged in mutations(folder_files[name], 1, count):
        (tmp_path / name).write_bytes(damaged)
        load_whole(tmp_path)


def test_a_changed_tokenizer_is_loaded_or_refused(folder_files: dict[str, bytes], tmp_path: Path) -> None:
    write(tmp_path, folder_files)
    for damaged in mutations(folder_files["tokenizer.json"], 2, 40):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        load_whole(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_safetensors_header_is_loaded_or_refused(
    seed: int, folder_files: dict[str, bytes], tmp_path: Path
) -> None:
    raw = folder_files["model.safetensors"]
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = raw[8 : 8 + length], raw[8 + length :]
    write(tmp_path, folder_files)
    for number, damaged in enumerate(mutations(header, seed, 60)):
        announced = len(damaged) if number % 3 else EXTREMES[number % len(EXTREMES)]
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", announced) + damaged + data)
        load_whole(tmp_path)


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, 1e400, "x", [], {}, [[1]], *EXTREMES])
def test_any_value_in_a_configuration_is_loaded_or_refused(
    value: Any, folder_files: dict[str, bytes], tmp_path: Path
) -> None:
    write(tmp_path, folder_files)
    config = json.loads(folder_files["config.json"])
    for key in config:
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        load_whole(tmp_path)


def test_a_pickle_by_any_name_is_never_run(folder_files: dict[str, bytes], tmp_path: Path) -> None:
    witness = tmp_path / "it-was-run"
    pickled = b"cposix\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR."
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        write(tmp_path, folder_files)
        (tmp_path / name).write_bytes(pickled)
        assert not load_whole(tmp_path)
    path = tmp_path / "m.gguf"
    path.write_bytes(pickled)
    assert not load_whole(path)
    assert not witness.exists()
