"""Finding a model: what its configuration says, what is refused, and what its identity depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import msgspec
import numpy as np
import pytest
from transformers import AutoConfig

from tests.model.tiny_gguf import dimensions, write_gguf
from tests.model.tiny_models import CONFIGS, SHAPE, saved, tiny_model
from transload.arch import Rope
from transload.deploy.spec import DEFAULT_MODEL, ModelSpec
from transload.errors import CheckpointError
from transload.model import embedded, hub
from transload.model.hf_config import context_length, read_arch
from transload.model.source import DEFAULT_ARCH, locate

PLAIN = {"model_type": "llama", **SHAPE}


def arch_of(**keys: Any) -> Any:
    return read_arch({**PLAIN, **keys}, name="m", path=Path("config.json"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "tiny")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_of_each_family_is_located(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    files = locate(ModelSpec(path=str(saved(model, tmp_path / "m"))))
    arch, config = files.arch, model.config
    assert files.kind == "safetensors"
    assert files.stored_dtype == "float32"
    assert files.weights_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert arch.family == config.model_type
    assert arch.head_dim == getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert arch.num_kv_heads == 2
    assert arch.tied_embeddings == config.tie_word_embeddings
    assert arch.norm_eps == config.rms_norm_eps
    assert arch.sliding_window == (64 if name == "mistral" else None)
    assert arch.qk_norm == (name == "qwen3")
    assert arch.qkv_bias == (name in ("qwen2", "llama-biases"))
    assert arch.output_bias == arch.mlp_bias == (name == "llama-biases")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 500_000.0},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "truncate": False, "mscale": 0.7}},
    {"rope_scaling": None, "rope_parameters": None},
]


@pytest.mark.parametrize("keys", ROPES, ids=lambda keys: json.dumps(keys)[:60])
def test_rope_is_read_as_transformers_reads_it(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PLAIN, **keys}))
    wanted = AutoConfig.from_pretrained(tmp_path).rope_parameters
    rope = arch_of(**keys).rope
    assert rope.kind == wanted["rope_type"]
    assert rope.theta == wanted["rope_theta"]
    renamed = {"original_max_position": "original_max_position_embeddings"}
    for field in ("factor", "original_max_position", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        default = getattr(Rope(), field)
        if rope.kind in ("llama3", "yarn") or field == "factor":
            assert getattr(rope, field) == wanted.get(renamed.get(field, field), default), field
    assert rope.truncate == wanted.get("truncate", True)
    assert rope.mscale == wanted.get("mscale")


def test_the_context_grows_with_the_scaling_that_extends_it() -> None:
    assert context_length(arch_of()) == 512
    assert context_length(arch_of(rope_scaling={"type": "linear", "factor": 2.0})) == 1024
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 400}
    assert context_length(arch_of(rope_scaling=yarn)) == 1600
    assert context_length(arch_of(rope_scaling={"rope_type": "llama3", **LLAMA3})) == 512


SLIDING: list[tuple[dict[str, Any], int | None, tuple[bool, ...] | None]] = [
    ({"model_type": "qwen2"}, None, None),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 64, None),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        64,
        (False, True),
    ),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, None, None),
    ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64}, None, None),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": None}, None, None),
    (
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        32,
        (True, False),
    ),
    ({"model_type": "mistral"}, 4096, None),
    ({"model_type": "mistral", "sliding_window": None}, None, None),
    ({"model_type": "llama", "sliding_window": 64}, None, None),
]


@pytest.mark.parametrize(("keys", "window", "layers"), SLIDING)
def test_the_sliding_window_is_read_as_transformers_reads_it(
    keys: dict[str, Any], window: int | None, layers: tuple[bool, ...] | None
) -> None:
    arch = arch_of(**keys)
    assert (arch.sliding_window, arch.sliding_layers) == (window, layers)


def test_missing_keys_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    bare = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        keys = {"model_type": model_type, **bare, "num_attention_heads": 32, "hidden_size": 512}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        wanted = AutoConfig.from_pretrained(tmp_path)
        arch = read_arch(keys, name="m", path=tmp_path)
        assert arch.num_kv_heads == wanted.num_key_value_heads
        assert arch.max_position == wanted.max_position_embeddings
        assert arch.head_dim == getattr(wanted, "head_dim", 16)
        assert arch.norm_eps == wanted.rms_norm_eps
        assert arch.tied_embeddings == wanted.tie_word_embeddings
        assert arch.rope.theta == wanted.rope_parameters["rope_theta"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'"),
    ({"hidden_size": -1}, "hidden_size is -1"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"num_hidden_layers": 1_000_000}, "layers"),
    ({"num_attention_heads": None}, "num_attention_heads is None"),
    ({"num_key_value_heads": 3}, "cannot share 3"),
    ({"head_dim": 15}, "even number"),
    ({"num_attention_heads": 1000}, "head_dim"),
    ({"hidden_act": "gelu"}, "silu"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised safetensors"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": {"type": "linear"}}, "factor is None"),
    ({"rope_scaling": [1]}, "wanted an object"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
    ({"partial_rotary_factor": 0.5}, "whole heads"),
    ({"model_type": "mistral", "layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ({"tie_word_embeddings": "yes"}, "true or false"),
]


@pytest.mark.parametrize(("keys", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_configuration_that_cannot_be_followed_is_refused_by_name(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as refusal:
        arch_of(**keys)
    assert "config.json" in str(refusal.value)


def test_identity_names_the_weights_and_not_the_folder(folder: Path, tmp_path: Path) -> None:
    first = locate(ModelSpec(path=str(folder)))
    other = tmp_path / "elsewhere"
    folder.rename(other)
    assert locate(ModelSpec(path=str(other))).identity == first.identity


def test_identity_changes_when_one_weight_changes(folder: Path, tmp_path: Path) -> None:
    first = locate(ModelSpec(path=str(folder)))
    model = tiny_model("llama")
    layer: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    layer.weight.data += 1.0
    assert locate(ModelSpec(path=str(saved(model, tmp_path / "tuned")))).identity != first.identity


def test_identity_changes_with_how_the_weights_are_used(folder: Path) -> None:
    first = locate(ModelSpec(path=str(folder)))
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "rms_norm_eps": 1e-3}))
    assert locate(ModelSpec(path=str(folder))).identity != first.identity


def test_random_weights_need_a_configuration_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    files = locate(ModelSpec(path=str(tmp_path), load_format="dummy"))
    assert files.kind == "dummy"
    assert files.paths == ()
    assert files.arch.hidden_size == 64


def test_random_weights_of_the_default_model_need_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetch", lambda **_: pytest.fail("fetched"))
    files = locate(ModelSpec(load_format="dummy"))
    assert files.arch == DEFAULT_ARCH
    assert files.tokenizer_gguf is None


def test_a_path_that_is_nothing_says_what_it_could_have_been() -> None:
    with pytest.raises(CheckpointError, match=f"no such file or folder.*owner/name.*{DEFAULT_MODEL}"):
        locate(ModelSpec(path="./not/a/model/anywhere"))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        locate(ModelSpec(path=str(tmp_path)))


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        locate(ModelSpec(path=str(tmp_path)))


def test_a_missing_tensor_is_refused_by_name(folder: Path) -> None:
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..*missing"):
        locate(ModelSpec(path=str(folder)))


def test_a_tensor_of_another_shape_is_refused_by_name(folder: Path) -> None:
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "intermediate_size": 100}))
    with pytest.raises(CheckpointError, match=r"gate_proj.*\[96, 64\], wanted \[100, 64\]"):
        locate(ModelSpec(path=str(folder)))


def test_weights_that_would_be_left_out_are_refused(folder: Path) -> None:
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*not part of"):
        locate(ModelSpec(path=str(folder)))


def hub_cache(home: Path, folder: Path, repository: str, commit: str) -> None:
    """Lay out a model as huggingface_hub caches it."""
    root = home / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots").mkdir()
    folder.rename(root / "snapshots" / commit)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
    return home


def test_a_hub_model_is_taken_from_the_hubs_cache_when_offline(folder: Path, offline_hub: Path) -> None:
    direct = locate(ModelSpec(path=str(folder)))
    hub_cache(offline_hub, folder, "someone/tiny-model", "a" * 40)
    for revision in (None, "main", "a" * 40):
        files = locate(ModelSpec(path="someone/tiny-model", revision=revision))
        assert files.identity == direct.identity
        assert files.name == files.arch.name == "someone/tiny-model"


def test_a_hub_model_that_cannot_be_had_says_what_to_do(offline_hub: Path) -> None:
    with pytest.raises(CheckpointError, match=r"someone/absent.*not in the local cache.*HF_HUB_OFFLINE"):
        locate(ModelSpec(path="someone/absent"))


def test_one_gguf_file_of_a_hub_model_can_be_named(tmp_path: Path, offline_hub: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    rows = np.zeros((320, 64), dtype=np.float32)
    write_gguf(folder / "tiny-Q8_0.gguf", {"token_embd.weight": (rows, "Q8_0")}, fill=dimensions())
    hub_cache(offline_hub, folder, "someone/tiny-GGUF", "b" * 40)
    with pytest.raises(CheckpointError, match=r"tiny-Q8_0\.gguf.*missing"):  # found, and read as far as it goes
        locate(ModelSpec(path="someone/tiny-GGUF/tiny-Q8_0.gguf"))


@pytest.mark.parametrize("path", ["someone/../../etc/x.gguf", "a/b/c", "/a/b", "a b/c"])
def test_a_path_that_is_no_hub_id_never_reaches_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch_from_hub", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        locate(ModelSpec(path=path))


def test_one_file_of_a_folder_is_refused_with_what_to_name_instead(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="name its folder"):
        locate(ModelSpec(path=str(folder / "model.safetensors")))


@pytest.mark.parametrize("module", ["source", "tokenizer", "detokenizer"])
def test_the_front_end_can_use_it_without_torch(module: str) -> None:
    code = f"import sys, transload.model.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_incomplete_hub_snapshot_is_refused(folder: Path, offline_hub: Path) -> None:
    os.remove(folder / "model.safetensors")
    hub_cache(offline_hub, folder, "someone/tiny-model", "a" * 40)
    with pytest.raises(CheckpointError, match="safetensors"):
        locate(ModelSpec(path="someone/tiny-model"))


def test_what_was_found_can_be_sent_to_another_process(folder: Path) -> None:
    files = locate(ModelSpec(path=str(folder)))
    sent = msgspec.msgpack.encode(files, enc_hook=str)
    assert msgspec.msgpack.decode(sent, type=type(files), dec_hook=lambda kind, text: kind(text)) == files
