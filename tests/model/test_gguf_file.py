"""The GGUF reader: what a good file says, and that no bad file crashes it or makes it allocate much."""

from __future__ import annotations

import contextlib
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model.tiny_gguf import dimensions, write_gguf
from transload.deploy.spec import ModelSpec
from transload.errors import CheckpointError
from transload.model.gguf_arch import llama3_factors, read_gguf_arch
from transload.model.gguf_file import GgufFile
from transload.model.source import locate

EMBEDDING = np.arange(320 * 64, dtype=np.float32).reshape(320, 64)


def scalars(writer: gguf.GGUFWriter) -> None:
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint64("u64", 2**63)
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("flag", True)
    writer.add_string("text", "Grüße 🎉")
    writer.add_array("texts", ["a", "", "ß"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("reals", [0.5, -0.25])


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    file = GgufFile(write_gguf(tmp_path / "m.gguf", {"t": (EMBEDDING, "F32")}, fill=scalars))
    assert file.architecture == "llama"
    assert (file.integer("u8"), file.integer("i8"), file.integer("u64")) == (200, -100, 2**63)
    assert (file.number("f32"), file.number("f64")) == (1e-5, 0.1)
    assert file.flag("flag", False) is True
    assert file.text("text") == "Grüße 🎉"
    assert file.texts("texts") == ["a", "", "ß"]
    assert (file.numbers("numbers"), file.numbers("reals")) == ([1.0, -2.0, 3.0], [0.5, -0.25])


def test_a_tensors_place_is_where_its_bytes_are(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"a": (EMBEDDING[:3], "F32"), "b": (EMBEDDING, "F16")})
    file = GgufFile(path)
    tensor = file.tensors["b"]
    assert (tensor.kind, tensor.shape) == ("F16", (320, 64))
    assert np.array_equal(file.array(tensor).view(np.float16).reshape(320, 64), EMBEDDING.astype(np.float16))


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda file: file.integer("text"), "'text' is 'Grüße 🎉', wanted a whole number"),
        (lambda file: file.integer("flag"), "wanted a whole number"),
        (lambda file: file.number("texts"), "wanted a finite number"),
        (lambda file: file.flag("u8", True), "wanted true or false"),
        (lambda file: file.text("u8"), "wanted a string"),
        (lambda file: file.texts("numbers"), "wanted a list of strings"),
        (lambda file: file.numbers("texts"), "wanted a list of numbers"),
        (lambda file: file.integer("absent"), "'absent' is missing"),
    ],
)
def test_metadata_of_another_type_is_refused(read: Any, says: str, tmp_path: Path) -> None:
    file = GgufFile(write_gguf(tmp_path / "m.gguf", {"t": (EMBEDDING, "F32")}, fill=scalars))
    with pytest.raises(CheckpointError, match=says):
        read(file)


def test_a_type_that_is_not_loaded_is_refused_with_those_that_are(tmp_path: Path) -> None:
    raw = np.zeros((320, 84), dtype=np.uint8)
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": (raw, "Q2_K")})
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' has type Q2_K.*BF16, F16, F32, Q4_0, Q4_1, Q4_K"):
        GgufFile(path)


def test_an_architecture_that_is_not_implemented_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": (EMBEDDING, "F32")}, architecture="gemma3")
    with pytest.raises(CheckpointError, match=r"architecture 'gemma3' is not implemented.*llama, qwen2, qwen3"):
        locate(ModelSpec(path=str(path)))


def with_extra(**extra: Any) -> Any:
    def fill(writer: gguf.GGUFWriter) -> None:
        dimensions()(writer)
        for key, value in extra.items():
            name = f"llama.{key.replace('__', '.')}"
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            else:
                writer.add_uint32(name, value)

    return fill


REFUSED = [
    ({"expert_count": 8}, "mixture of experts"),
    ({"attention__key_length": 32}, "rope.dimension_count"),
    ({"attention__value_length": 32}, "value_length"),
    ({"rope__scaling__type": "longrope"}, "longrope"),
    ({"rope__scaling__type": "yarn", "rope__scaling__attn_factor": 2.0}, "attn_factor"),
]


@pytest.mark.parametrize(("extra", "says"), REFUSED)
def test_metadata_that_would_change_the_computation_is_refused(extra: Any, says: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": (EMBEDDING, "F32")}, fill=with_extra(**extra))
    with pytest.raises(CheckpointError, match=says):
        read_gguf_arch(GgufFile(path), name="m")


def test_named_rope_scaling_is_read(tmp_path: Path) -> None:
    extra = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 128}
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": (EMBEDDING, "F32")}, fill=with_extra(**extra))
    rope = read_gguf_arch(GgufFile(path), name="m").rope
    assert (rope.kind, rope.factor, rope.original_max_position, rope.theta) == ("yarn", 4.0, 128, 10_000.0)


def converter_factors(theta: float, dim: int, factor: float) -> list[float]:
    """llama.cpp's converter, as it stands there (LlamaModel.generate_extra_tensors in convert_hf_to_gguf.py)."""
    low, high, old = 1.0, 4.0, 8192
    factors = []
    for freq in [1.0 / (theta ** (i / dim)) for i in range(0, dim, 2)]:
        wavelen = 2 * math.pi / freq
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelen - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_factors(factor: float, tmp_path: Path) -> None:
    stored = np.array(converter_factors(500_000.0, 128, factor), dtype=np.float32)
    tensors = {"token_embd.weight": (np.zeros((8, 512), np.float32), "F32"), "rope_freqs.weight": (stored, "F32")}

    path = write_gguf(tmp_path / "m.gguf", tensors, fill=llama3_dimensions)
    rope = read_gguf_arch(GgufFile(path), name="m").rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("llama3", factor, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)
    assert np.allclose(llama3_factors(rope, 128), stored)


def llama3_dimensions(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(1)
    writer.add_context_length(131_072)
    writer.add_embedding_length(512)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)


def test_rope_factors_of_an_unknown_rule_are_refused(tmp_path: Path) -> None:
    stored = np.linspace(1, 8, 8, dtype=np.float32)
    tensors = {"token_embd.weight": (EMBEDDING, "F32"), "rope_freqs.weight": (stored, "F32")}
    path = write_gguf(tmp_path / "m.gguf", tensors, fill=dimensions())
    with pytest.raises(CheckpointError, match="does not follow Llama 3's rule"):
        read_gguf_arch(GgufFile(path), name="m")


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def header(*, num_tensors: int = 0, num_entries: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


PADDING = bytes(4096)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "other magic": (b"PK\x03\x04" + PADDING, "does not start with 'GGUF'"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "count of entries": (header(num_entries=2**63, rest=PADDING), "claims 9223372036854775808 metadata"),
    "count of tensors": (header(num_tensors=2**40, rest=PADDING), "claims 1099511627776 tensors"),
    "length of a key": (header(num_entries=1, rest=struct.pack("<Q", 2**62) + PADDING), "ends inside its header"),
    "unknown type": (header(num_entries=1, rest=string(b"k") + struct.pack("<I", 77) + PADDING), "unknown type 77"),
    "length of a list": (
        header(num_entries=1, rest=string(b"k") + struct.pack("<IIQ", 9, 4, 2**61) + PADDING),
        "numbers under 'k'",
    ),
    "length of a list of strings": (
        header(num_entries=1, rest=string(b"k") + struct.pack("<IIQ", 9, 8, 2**61) + PADDING),
        "strings under 'k'",
    ),
    "string in a list": (
        header(num_entries=1, rest=string(b"k") + struct.pack("<IIQQ", 9, 8, 2, 2**60) + PADDING),
        "ends inside its header",
    ),
    "list of lists": (
        header(num_entries=1, rest=string(b"k") + struct.pack("<IIQ", 9, 9, 1) + PADDING),
        "a list of type 9",
    ),
    "not UTF-8": (header(num_entries=1, rest=string(b"\xff\xfe") + PADDING), "not UTF-8"),
    "key twice": (header(num_entries=2, rest=(string(b"k") + struct.pack("<IB", 0, 1)) * 2 + PADDING), "comes twice"),
    "alignment": (
        header(num_entries=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 3) + PADDING),
        "alignment 3",
    ),
    "split": (
        header(num_entries=1, rest=string(b"split.count") + struct.pack("<IH", 2, 3) + PADDING),
        "one of 3 parts",
    ),
    "no dimensions": (header(num_tensors=1, rest=tensor(b"t", (), 0, 0) + PADDING), "0 dimensions"),
    "many dimensions": (
        header(num_tensors=1, rest=string(b"t") + struct.pack("<I", 2**31) + PADDING),
        "2147483648 dimensions",
    ),
    "empty tensor": (header(num_tensors=1, rest=tensor(b"t", (4, 0), 0, 0) + PADDING), "empty tensor"),
    "huge tensor": (header(num_tensors=1, rest=tensor(b"t", (2**60, 2**60), 0, 0) + PADDING), "should end at byte"),
    "huge offset": (header(num_tensors=1, rest=tensor(b"t", (4,), 0, 2**64 - 1) + PADDING), "should end at byte"),
    "rows cut in a block": (header(num_tensors=1, rest=tensor(b"t", (33, 32), 3, 0) + PADDING), "multiple of 32"),
    "tensor twice": (header(num_tensors=2, rest=tensor(b"t", (4,), 0, 0) * 2 + PADDING), "listed twice"),
    "unknown tensor type": (header(num_tensors=1, rest=tensor(b"t", (4,), 4000, 0) + PADDING), "type number 4000"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_with_little_memory(what: str, tmp_path: Path) -> None:
    raw, says = DAMAGED[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=says) as refusal:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in str(refusal.value)


def whole_model(path: Path) -> bytes:
    random = np.random.default_rng(0)
    layer = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)}
    layer |= {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (320, 64), "output_norm.weight": (64,)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    tensors = {
        name: (random.standard_normal(shape, dtype=np.float32), "Q8_0" if len(shape) == 2 else "F32")
        for name, shape in shapes.items()
    }
    return write_gguf(path, tensors, fill=dimensions(num_layers=1)).read_bytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = whole_model(path)
    end = max(tensor.offset + tensor.num_bytes for tensor in GgufFile(path).tensors.values())
    for length in [*range(0, 2000, 37), *range(2000, end, 9973), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            locate(ModelSpec(path=str(path)))


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return whole_model(tmp_path_factory.mktemp("whole") / "m.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2400), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_in_the_header_never_crash_the_reader(
    changes: list[tuple[int, int]], good_bytes: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    raw = bytearray(good_bytes)
    for place, byte in changes:
        raw[place] = byte
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):  # a change may do no harm; anything else must be this error
        locate(ModelSpec(path=str(path)))
