"""Small tokenizers, trained on the spot, of the two kinds the Llama family has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from transload.model.tokenizer import ModelTokenizer
from transload.model.tokenizer_parts import TokenizerParts

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock; we'll go, they've gone!",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Привет, как дела? Die Hauptstadt von Deutschland ist Berlin. 日本語 émoji 🎉🎉 1234567890",
] * 4
SPECIAL = ["<|begin|>", "<|end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken("plain added 語", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2's and Mistral's tokenizer.json have it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator([text.split("日")[0] for text in CORPUS], trainers.BpeTrainer(vocab_size=400))
    learnt = json.loads(trained.to_str())["model"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary |= {piece: 259 + number for number, piece in enumerate(learnt["vocab"])}
    merges = [(left, right) for left, right in learnt["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return tokenizer


def model_tokenizer(tokenizer: Tokenizer, **parts: Any) -> ModelTokenizer:
    # A few ids more than there are tokens, as padded models have.
    return ModelTokenizer(
        TokenizerParts(tokenizer=tokenizer, **parts), vocab_size=tokenizer.get_vocab_size() + 8, context_length=512
    )


def saved_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
