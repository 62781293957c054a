"""Text to tokens and back, and conversations to text, for one model. Never imports torch.

Encoding releases the interpreter's lock, so a server does it to long texts on another thread (some 0.4 M tokens/s).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from transload.errors import CheckpointError, RequestError
from transload.model.chat import ChatTemplate
from transload.model.gguf_file import GgufFile
from transload.model.gguf_tokenizer import read_gguf_tokenizer
from transload.model.hf_config import context_length
from transload.model.json_file import read_json_if_there
from transload.model.source import ModelFiles
from transload.model.token_bytes import TokenBytes, byte_characters
from transload.model.tokenizer_parts import TokenizerParts

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MAX_TEMPLATE_BYTES = 1 << 20
PLACEHOLDER_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def load_tokenizer(files: ModelFiles) -> ModelTokenizer:
    """The tokenizer of a located model: out of its folder, or out of its GGUF file.

    Random weights without tokenizer files get a placeholder: each byte is a token. Raises `CheckpointError` if the
    files are missing, damaged, or of a kind that is not implemented.
    """
    # The library's threads would help with many texts at once only, and it warns when a process that used them forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if files.tokenizer_gguf is not None:
        parts = read_gguf_tokenizer(GgufFile(files.tokenizer_gguf))
    elif files.folder is not None and (files.kind != "dummy" or (files.folder / "tokenizer.json").exists()):
        parts = _from_folder(files.folder)
    else:
        parts = _placeholder(files.arch.vocab_size)
    return ModelTokenizer(parts, vocab_size=files.arch.vocab_size, context_length=context_length(files.arch))


class ModelTokenizer:
    """What the front end knows of a model's text."""

    def __init__(self, parts: TokenizerParts, *, vocab_size: int, context_length: int) -> None:
        self.vocab_size = vocab_size
        """Token ids the model takes: 0 to one less. It may have more than the tokenizer has tokens."""
        self.context_length = context_length
        """Longest prompt plus output in tokens."""
        self.bos_id = parts.bos_id
        self.eos_ids = tuple(number for number in parts.eos_ids if 0 <= number < vocab_size)
        """Tokens that end a text, the one of the model's configuration first."""
        self.token_table = TokenBytes(parts.tokenizer)
        self._tokenizer = parts.tokenizer
        self._template = ChatTemplate(parts.templates, parts.special_tokens)
        # Fine-tunes sometimes add tokens that their model has no row for.
        self._may_overflow = max(parts.tokenizer.get_vocab().values(), default=0) >= vocab_size

    @property
    def chat_template(self) -> str | None:
        """The jinja2 text used for conversations; None if the model has none."""
        return self._template.source

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text. Special tokens written in the text count as such.

        `special` adds what the model puts around prompts (BOS). Text out of `render_chat` holds that already: encode it
        with `special=False`. Raises `RequestError` if the text is not valid Unicode.
        """
        try:
            # Not `encode`: that holds the interpreter's lock (tokenizers 0.23), for seconds if the text is long.
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
        except TypeError as error:  # what the library says to half a surrogate pair
            raise RequestError(
                "the text has half a surrogate pair (\\ud800 to \\udfff), which is not valid Unicode",
                code="invalid_unicode",
            ) from error
        if self._may_overflow and (high := max(ids, default=0)) >= self.vocab_size:
            raise RequestError(
                f"the text has the token {high} ({self.token_text(high)!r}), which this model has no embedding for "
                f"(it has {self.vocab_size})"
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of some tokens. Bytes that are no UTF-8 become U+FFFD; ids without a token give nothing."""
        skipped = self.token_table.special_ids if skip_special else frozenset()
        table = self.token_table
        text = b"".join([table[token] for token in ids if token not in skipped]).decode(errors="replace")
        return text.removeprefix(" ") if table.strips_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly the bytes one token adds to a text; possibly a part of a character."""
        return self.token_table[token_id]

    def token_text(self, token_id: int) -> str:
        """One token on its own, for people: as `token_bytes`, with U+FFFD where that is no UTF-8."""
        return self.token_table[token_id].decode(errors="replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """A conversation as the model's text, special tokens included; encode it with `special=False`.

        Raises `RequestError` naming `messages` if the model's template does not accept them.
        """
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **extra)


def _from_folder(folder: Path) -> TokenizerParts:
    """tokenizer.json says how to tokenise; the files beside it which tokens are special, and the chat template."""
    tokenizer = _read_tokenizer(folder)
    settings = read_json_if_there(folder / "tokenizer_config.json")
    generation = read_json_if_there(folder / "generation_config.json")
    config = read_json_if_there(folder / "config.json")
    special = {name: text for name in SPECIAL_NAMES if (text := _token_text(settings.get(name))) is not None}
    bos = tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
    named = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    eos_ids = [*_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id")), *_ids(named)]
    return TokenizerParts(
        tokenizer=tokenizer,
        bos_id=bos if bos is not None else next(iter(_ids(config.get("bos_token_id"))), None),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        templates=_folder_templates(folder, settings.get("chat_template")),
        special_tokens=special,
    )


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).exists()]
        there = f" (only {', '.join(others)}, which is not read)" if others else ""
        raise CheckpointError(
            f"{folder}: no tokenizer.json{there}; make one: "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        raise CheckpointError(f"{path}: cannot be read ({error}); it is damaged, fetch it again") from error
    tokenizer.no_truncation()  # files often keep the limits they were trained with
    tokenizer.no_padding()
    return tokenizer


def _folder_templates(folder: Path, inline: Any) -> dict[str, str]:
    """Chat templates by name. A .jinja file wins over the one inside tokenizer_config.json."""
    templates: dict[str, str] = {}
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        for named in inline:
            if isinstance(named, dict) and isinstance(named.get("template"), str):
                templates[str(named.get("name"))] = named["template"]
    files = [("default", folder / "chat_template.jinja")]
    files += [(path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for name, path in files:
        if path.exists():
            if path.stat().st_size > MAX_TEMPLATE_BYTES:
                raise CheckpointError(f"{path}: larger than {MAX_TEMPLATE_BYTES} bytes; not a chat template")
            templates[name] = path.read_text(encoding="utf-8", errors="replace")
    return templates


def _token_text(entry: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: a string, or an object with its content."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _ids(entry: Any) -> list[int]:
    """A token id as the configuration files write it: a number, a list of them, or nothing."""
    listed = entry if isinstance(entry, list) else [entry]
    return [number for number in listed if isinstance(number, int) and not isinstance(number, bool)]


def _placeholder(vocab_size: int) -> TokenizerParts:
    """For random weights of a shape: a byte is a token, and each further id is a word, so that any output has text."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary |= {f"Ġ{number}": number for number in range(256, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizerParts(tokenizer=tokenizer, templates={"default": PLACEHOLDER_TEMPLATE})
