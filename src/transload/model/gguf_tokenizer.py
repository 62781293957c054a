"""Builds a tokenizer from the metadata of a GGUF file. No torch.

llama.cpp writes the vocabulary and the merges, but only the *name* of the rule that splits text before merging
(`tokenizer.ggml.pre`). The rules are in its src/llama-vocab.cpp; one that is not listed here is refused by name,
because any other rule gives other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from transload.errors import CheckpointError
from transload.model.gguf_file import GgufFile
from transload.model.tokenizer_parts import TokenizerParts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Values of `tokenizer.ggml.token_type`."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[str, ...]] = {
    # The comma and the digits of smollm: each digit stands alone before anything else is looked at.
    "smollm": (r"\p{N}", GPT2),
    "gpt-2": (GPT2,),
    "llama-bpe": (WORDS % "{1,3}",),
    "qwen2": (WORDS % "",),
    # Files from before the rule was written down; what llama.cpp does with them.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
SAME_RULE = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "": "default"}
BEGINS_WITH_BOS = ("llama-bpe",)
"""Rules whose models begin with BOS unless the file says otherwise."""
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>")
"""Control tokens that end a text in every model that has them. GGUF has room for few ids, llama.cpp adds these too."""


def read_gguf_tokenizer(file: GgufFile) -> TokenizerParts:
    """The tokenizer in a GGUF file. Raises `CheckpointError` if it is of a kind that is not implemented."""
    kind = file.text("tokenizer.ggml.model")
    tokens = file.texts("tokenizer.ggml.tokens")
    types = [int(number) for number in file.numbers("tokenizer.ggml.token_type")]
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types; the file is damaged")
    try:
        if kind == "gpt2":
            tokenizer, begins = _byte_level(file, tokens)
        elif kind == "llama":
            tokenizer, begins = _sentencepiece(file, tokens, types)
        else:
            raise CheckpointError(f"{file.path}: tokenizer {kind!r} is not implemented, wanted gpt2 or llama")
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{file.path}: the tokenizer's vocabulary or merges are damaged ({error})") from error
    _add_special(tokenizer, tokens, types)
    _add_post_processor(file, tokenizer, tokens, begins)
    return TokenizerParts(
        tokenizer=tokenizer,
        bos_id=_token_id(file, "bos", tokens),
        eos_ids=_eos_ids(file, tokens, types),
        templates=_templates(file),
        special_tokens={
            f"{name}_token": tokens[number]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (number := _token_id(file, key, tokens)) is not None
        },
    )


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether its texts begin with BOS if the file does not say."""
    named = file.text("tokenizer.ggml.pre", "")
    rule = SAME_RULE.get(named, named)
    if rule not in SPLITS:
        raise CheckpointError(
            f"{file.path}: pre-tokenizer {named!r} is not implemented, wanted one of "
            f"{', '.join([*SPLITS, *(name for name in SAME_RULE if name)])}; take the safetensors of the model"
        )
    merges: list[tuple[str, str]] = []
    for merge in file.texts("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise CheckpointError(f"{file.path}: merge {merge!r} is not two tokens; the file is damaged")
        merges.append((left, right))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[rule]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # in Qwen's own tokenizer.json; llama.cpp leaves it out
    return tokenizer, rule in BEGINS_WITH_BOS


def _sentencepiece(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE: the pair whose piece has the best score is merged first, so scores become ranks of merges."""
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens but {len(scores)} scores; the file is damaged")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pieces = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    ranked = [
        (-score, vocabulary[piece[:cut]], vocabulary[piece[cut:]])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.flag("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer, True


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are found in a text as they are written, before any splitting."""
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted and token]
        added = [AddedToken(token, special=special, normalized=False) for token in found]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _add_post_processor(file: GgufFile, tokenizer: Tokenizer, tokens: Sequence[str], begins: bool) -> None:
    """BOS before and EOS after a prompt, where the file asks for it."""
    around = {"$A": "$A"}
    special: list[tuple[str, int]] = []
    for key, default in (("bos", begins), ("eos", False)):
        if file.flag(f"tokenizer.ggml.add_{key}_token", default):
            number = _token_id(file, key, tokens)
            if number is None:
                raise CheckpointError(f"{file.path}: asks for {key.upper()} around prompts but names no such token")
            special.append((tokens[number], number))
            around[key] = tokens[number]
    if special:
        single = [around[key] for key in ("bos", "$A", "eos") if key in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _token_id(file: GgufFile, key: str, tokens: Sequence[str]) -> int | None:
    name = f"tokenizer.ggml.{key}_token_id"
    if name not in file.metadata:
        return None
    number = file.integer(name)
    if not 0 <= number < len(tokens):
        raise CheckpointError(f"{file.path}: {name} is {number}, but there are {len(tokens)} tokens")
    return number


def _eos_ids(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[int, ...]:
    named = [_token_id(file, key, tokens) for key in ("eos", "eot", "eom")]
    known = [
        number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == CONTROL and token in END_TOKENS
    ]
    return tuple(dict.fromkeys(number for number in [*named, *known] if number is not None))


def _templates(file: GgufFile) -> dict[str, str]:
    templates: dict[str, str] = {}
    for key in file.metadata:
        if key == "tokenizer.chat_template":
            templates["default"] = file.text(key)
        elif key.startswith("tokenizer.chat_template."):
            templates[key.removeprefix("tokenizer.chat_template.")] = file.text(key)
    return templates
