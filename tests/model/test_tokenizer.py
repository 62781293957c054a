"""Text to tokens: the reference strings, folders as transformers reads them, GGUF vocabularies as llama.cpp does."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.model.tiny_gguf import dimensions, vocabulary, write_gguf
from tests.model.tiny_models import SHAPE
from tests.model.tiny_tokenizers import byte_level, model_tokenizer, saved_tokenizer, sentencepiece
from transload.arch import ModelArch
from transload.deploy.spec import ModelSpec
from transload.errors import CheckpointError, RequestError
from transload.model.gguf_file import GgufFile
from transload.model.gguf_tokenizer import SPLITS, read_gguf_tokenizer
from transload.model.source import DEFAULT_ARCH, ModelFiles, locate
from transload.model.tokenizer import ModelTokenizer, load_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_tokens.json").read_text())["cases"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        ["It's", " 12", "345", "日本語", "  ", "\n\n", "é", "e\u0301", "🎉", "WE'LL", "!?", "\r\n", "ⅷ", "\t"]
    )
).map("".join)


@pytest.fixture(scope="module")
def smollm2() -> ModelTokenizer:
    return load_tokenizer(locate(ModelSpec()))


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: repr(case["text"][:20]))
def test_the_default_models_tokens_are_llama_cpps(case: dict[str, Any], smollm2: ModelTokenizer) -> None:
    assert smollm2.encode(case["text"]) == case["ids"]
    assert smollm2.decode(case["ids"], skip_special=False) == case["text"]


@pytest.mark.slow
def test_the_default_model_knows_its_special_tokens(smollm2: ModelTokenizer) -> None:
    assert smollm2.eos_ids[0] == 2
    assert (smollm2.bos_id, smollm2.vocab_size, smollm2.context_length) == (1, 49_152, 8192)
    rendered = smollm2.render_chat([{"role": "user", "content": "What is 2+2?"}])
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = smollm2.encode(rendered, special=False)
    assert ids[0] == 1 != ids[1]
    assert smollm2.decode(ids) == rendered.replace("<|im_start|>", "").replace("<|im_end|>", "")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def files_at(folder: Path, *, vocab_size: int = 600, kind: Any = "safetensors") -> ModelFiles:
    keys = {key: value for key, value in SHAPE.items() if key in ("hidden_size", "intermediate_size")}
    arch = ModelArch(
        name="m",
        family="llama",
        vocab_size=vocab_size,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=512,
        **keys,
    )
    return ModelFiles(
        kind=kind,
        name="m",
        paths=(),
        folder=folder,
        tokenizer_gguf=None,
        arch=arch,
        identity="",
        weights_bytes=0,
        stored_dtype="float32",
    )


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_a_folder_tokenises_as_its_tokenizer_json_says(make: Any, text: str) -> None:
    raw: Tokenizer = MADE.setdefault(make, make())
    tokenizer = model_tokenizer(raw)
    assert tokenizer.encode(text) == raw.encode(text).ids
    assert tokenizer.encode(text, special=False) == raw.encode(text, add_special_tokens=False).ids


MADE: dict[Any, Tokenizer] = {}


def test_bos_comes_with_plain_text_and_not_twice_with_a_chat(tmp_path: Path) -> None:
    saved_tokenizer(
        sentencepiece(),
        tmp_path,
        bos_token="<s>",
        eos_token={"content": "</s>"},
        chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    )
    tokenizer = load_tokenizer(files_at(tmp_path))
    assert tokenizer.encode("the fox")[0] == tokenizer.bos_id == 1
    assert tokenizer.encode("the fox", special=False)[0] != 1
    ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "the fox"}]), special=False)
    assert ids.count(1) == 1
    assert ids[-1] == 2 == tokenizer.eos_ids[0]


def test_end_tokens_are_gathered_from_all_files(tmp_path: Path) -> None:
    saved_tokenizer(byte_level(), tmp_path, eos_token="<|end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 10_000]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9, "bos_token_id": 0}))
    tokenizer = load_tokenizer(files_at(tmp_path))
    assert tokenizer.eos_ids == (7, 9, 1)
    assert tokenizer.bos_id == 0


def test_limits_left_in_tokenizer_json_do_not_cut_prompts(tmp_path: Path) -> None:
    raw = byte_level()
    raw.enable_truncation(3)
    raw.enable_padding(length=8)
    saved_tokenizer(raw, tmp_path)
    assert len(load_tokenizer(files_at(tmp_path)).encode("The quick brown fox jumps")) > 3
    assert len(load_tokenizer(files_at(tmp_path)).encode("T")) == 1


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    saved_tokenizer(byte_level(), tmp_path)
    tokenizer = load_tokenizer(files_at(tmp_path, vocab_size=400))
    assert tokenizer.encode("the fox")
    with pytest.raises(RequestError, match="plain added"):
        tokenizer.encode("a plain added 語 b")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        model_tokenizer(byte_level()).encode("a\ud800b")


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer = model_tokenizer(byte_level())
    text = "The quick brown fox jumps over the lazy dog. " * 20_000
    ids: list[int] = []
    worker = threading.Thread(target=lambda: ids.extend(tokenizer.encode(text)))
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        worker.join(timeout=0.001)
    # Were the interpreter's lock held, the first or second join would return when all is done.
    assert turns > 10
    assert len(ids) > 100_000


BAD_FILES: list[tuple[str, Any, str]] = [
    ("tokenizer.json", None, "no tokenizer.json"),
    ("tokenizer.json", "{", "damaged"),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nonsense"}}', "damaged"),
    ("tokenizer_config.json", "[1]", "wanted an object"),
    ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "not valid jinja2"),
    ("generation_config.json", "{", "not valid JSON"),
]


@pytest.mark.parametrize(("name", "text", "says"), BAD_FILES)
def test_damaged_tokenizer_files_are_refused(name: str, text: str | None, says: str, tmp_path: Path) -> None:
    saved_tokenizer(byte_level(), tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer(files_at(tmp_path))


def test_a_decoder_that_is_not_implemented_is_refused(tmp_path: Path) -> None:
    raw = json.loads(byte_level().to_str())
    raw["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="WordPiece"):
        load_tokenizer(files_at(tmp_path))


def test_random_weights_without_a_tokenizer_get_a_placeholder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(files_at(tmp_path, vocab_size=1000, kind="dummy"))
    text = "Any text: 日本 🎉\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert all(tokenizer.token_text(number) for number in range(1000))
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "user: Hi\nassistant: "


# ---------------------------------------------------------------------------------------------------------------------
# GGUF vocabularies

ONE_ROW = {"token_embd.weight": (np.zeros((1, 64), dtype=np.float32), "F32")}


def gguf_tokenizer(path: Path, fill: Any) -> Any:
    return read_gguf_tokenizer(GgufFile(write_gguf(path / "vocab.gguf", ONE_ROW, fill=fill)))


def byte_level_parts(raw: Tokenizer) -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a byte-level tokenizer, as llama.cpp's converter writes them."""
    tokens = [raw.id_to_token(number) or "" for number in range(raw.get_vocab_size())]
    added = raw.get_added_tokens_decoder()
    types = [(3 if added[n].special else 4) if n in added else 1 for n in range(len(tokens))]
    merges = [" ".join(merge) for merge in json.loads(raw.to_str())["model"]["merges"]]
    return tokens, types, merges


def byte_level_gguf(path: Path, pre: str | None, **flags: Any) -> Any:
    tokens, types, merges = byte_level_parts(byte_level())

    def fill(writer: gguf.GGUFWriter) -> None:
        vocabulary(writer, tokens, types, pre=pre, merges=merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        if "add_bos" in flags:
            writer.add_add_bos_token(flags["add_bos"])
        if "chat_template" in flags:
            writer.add_chat_template(flags["chat_template"])

    return gguf_tokenizer(path, fill)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_smollm_gguf_tokenises_as_the_tokenizer_it_was_made_from(text: str) -> None:
    assert SMOLLM["made"].encode(text).ids == SMOLLM["original"].encode(text).ids


SMOLLM: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def smollm_pair(tmp_path_factory: pytest.TempPathFactory) -> None:
    SMOLLM["original"] = byte_level()
    SMOLLM["made"] = byte_level_gguf(tmp_path_factory.mktemp("smollm"), "smollm").tokenizer


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    assert tokenizer.pre_tokenizer is not None
    return [text[slice(*place)] for _, place in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


WHERE_TEXT_IS_SPLIT = [
    ("smollm", "a 12 we'LL  x\n\n3", ["a", " ", "1", "2", " we", "'", "LL", " ", " x", "\n\n", "3"]),
    ("gpt-2", "a 12 we'll  x\n\n3", ["a", " 12", " we", "'ll", " ", " x", "\n", "\n", "3"]),
    ("llama-bpe", "a 12345 we'LL  x!\n\n3", ["a", " ", "123", "45", " we", "'LL", " ", " x", "!\n\n", "3"]),
    ("qwen2", "a 123 we'LL  x!\n\n3", ["a", " ", "1", "2", "3", " we", "'LL", " ", " x", "!\n\n", "3"]),
    ("default", "a 12345 we'll  x!", ["a", " ", "123", "45", " we", "'", "ll", " ", " x", "!"]),
]


@pytest.mark.parametrize(("pre", "text", "wanted"), WHERE_TEXT_IS_SPLIT)
def test_each_rule_splits_text_where_llama_cpp_does(pre: str, text: str, wanted: list[str], tmp_path: Path) -> None:
    assert pieces(byte_level_gguf(tmp_path, pre).tokenizer, text) == wanted


def test_each_rule_has_a_test() -> None:
    assert {pre for pre, _, _ in WHERE_TEXT_IS_SPLIT} == set(SPLITS)


def test_a_rule_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pre-tokenizer 'tekken' is not implemented.*smollm, gpt-2, llama-bpe"):
        byte_level_gguf(tmp_path, "tekken")


def test_a_file_without_a_rule_is_split_as_llama_cpp_splits_it(tmp_path: Path) -> None:
    assert pieces(byte_level_gguf(tmp_path, None).tokenizer, "x 1234") == ["x", " ", "123", "4"]


@pytest.mark.parametrize(
    ("pre", "flags", "begins"),
    [
        ("smollm", {}, False),
        ("smollm", {"add_bos": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos": False}, False),
    ],
)
def test_bos_is_added_where_the_file_or_its_rule_says(pre: str, flags: Any, begins: bool, tmp_path: Path) -> None:
    tokenizer = model_tokenizer(byte_level_gguf(tmp_path, pre, **flags).tokenizer)
    assert (tokenizer.encode("fox")[0] == 0) == begins
    assert tokenizer.encode("fox", special=False)[0] != 0


def test_special_and_added_tokens_are_found_in_text(tmp_path: Path) -> None:
    parts = byte_level_gguf(tmp_path, "smollm", chat_template="{{ eos_token }}")
    tokenizer = model_tokenizer(parts.tokenizer, templates=parts.templates, special_tokens=parts.special_tokens)
    ids = tokenizer.encode("<|begin|>a plain added 語<|end|>")
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.decode(ids) == "a plain added 語"
    assert tokenizer.render_chat([{"role": "user"}]) == "<|end|>"
    assert (parts.bos_id, parts.eos_ids) == (0, (1,))


def spm_reference(text: str, pieces_by_score: dict[str, float]) -> list[str]:
    """llama.cpp's SentencePiece rule (llm_tokenizer_spm in src/llama-vocab.cpp), without its speed."""
    symbols = list(text)
    while True:
        pairs = [
            (-pieces_by_score[left + right], place)
            for place, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in pieces_by_score
        ]
        if not pairs:
            return [
                part
                for symbol in symbols
                for part in ([symbol] if symbol in pieces_by_score else [f"<0x{b:02X}>" for b in symbol.encode()])
            ]
        place = min(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


SPM_PIECES = [
    *(
        "▁t",
        "▁a",
        "th",
        "he",
        "the",
        "▁the",
        "an",
        "and",
        "▁and",
        "nd",
        "er",
        "re",
        "▁r",
        "her",
        "▁h",
        "▁he",
        "tt",
        "ee",
    ),
    *"▁thandre",
]
SPM_SCORES = {piece: -float(number) for number, piece in enumerate(SPM_PIECES)}
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_SCORES]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    def fill(writer: gguf.GGUFWriter) -> None:
        types = [2, 3, 3, *[6] * 256, *[1] * len(SPM_SCORES)]
        scores = [0.0] * 259 + list(SPM_SCORES.values())
        vocabulary(writer, SPM_TOKENS, types, model="llama", pre=None, scores=scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    return model_tokenizer(gguf_tokenizer(tmp_path_factory.mktemp("spm"), fill).tokenizer)


@settings(max_examples=300, deadline=None)
@given(text=st.text("thean rdé🎉", min_size=1, max_size=30))
def test_a_sentencepiece_gguf_tokenises_by_llama_cpps_rule(text: str, spm: ModelTokenizer) -> None:
    wanted = [1, *(SPM_TOKENS.index(token) for token in spm_reference("▁" + text.replace(" ", "▁"), SPM_SCORES))]
    assert spm.encode(text) == wanted
    assert spm.decode(wanted) == text


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda w: vocabulary(w, ["a", "b"], [1], merges=["a b"]), "2 tokens but 1 token types"),
        (lambda w: vocabulary(w, ["a", "b"], [1, 1], merges=["ab"]), "merge 'ab' is not two tokens"),
        (lambda w: vocabulary(w, ["a", "b"], [1, 1], merges=["a c"]), "damaged"),
        (lambda w: vocabulary(w, ["a"], [1], model="bert"), "tokenizer 'bert' is not implemented"),
        (lambda w: vocabulary(w, ["a", "b"], [1, 1], model="llama", scores=[1.0]), "2 tokens but 1 scores"),
        (lambda w: None, "tokenizer.ggml.model' is missing"),
    ],
)
def test_a_damaged_vocabulary_is_refused(spoil: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        gguf_tokenizer(tmp_path, spoil)


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        vocabulary(writer, ["a", "b", "ab"], [1, 1, 1], merges=["a b"])
        writer.add_eos_token_id(3)

    with pytest.raises(CheckpointError, match="eos_token_id is 3, but there are 3 tokens"):
        gguf_tokenizer(tmp_path, fill)


def test_the_library_agrees_on_a_saved_folder(tmp_path: Path) -> None:
    saved_tokenizer(byte_level(), tmp_path, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>")
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(files_at(tmp_path))
    for case in GOLDEN:
        ids = oracle(case["text"])["input_ids"]
        assert tokenizer.encode(case["text"]) == ids
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_the_default_shape_has_a_tokenizer_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(locate(ModelSpec(load_format="dummy")))
    assert (tokenizer.vocab_size, tokenizer.context_length) == (DEFAULT_ARCH.vocab_size, DEFAULT_ARCH.max_position)
    assert tokenizer.eos_ids == ()


def test_dimensions_alone_are_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model"):
        gguf_tokenizer(tmp_path, dimensions())
