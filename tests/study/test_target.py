from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.study.scripted_server import Call, Script, scripted_server
from transload.errors import TransloadError
from transload.study.http_client import HttpClient, parse_url
from transload.study.prompts import COMMON_WORDS
from transload.study.target import FALLBACK_IDS, Target, discover


def ask(script: Script, **wishes: Any) -> Target:
    async def main() -> Target:
        async with scripted_server(script) as url:
            client = HttpClient(parse_url(url))
            try:
                return await discover(client, **wishes)
            finally:
                await client.close()

    return asyncio.run(main())


SPLIT = {"American": 2, "himself": 2}
"""Words that the scripted tokenizer makes more than one token of."""


class Server:
    """Tells its models and tokenizes like vLLM: a token a word, but for those in SPLIT; one more at the beginning."""

    def __init__(self, num_template_tokens: int = 11) -> None:
        self.num_template_tokens = num_template_tokens
        self.num_questions = 0

    async def __call__(self, call: Call) -> None:
        if call.path == "/v1/models":
            await call.json(200, {"object": "list", "data": [{"id": "smol", "max_model_len": 2048}, {"id": "other"}]})
            return
        if call.path == "/v1/completions":
            known = call.fields["model"] == "alias"
            await call.json(
                200 if known else 404, {"choices": []} if known else {"error": {"message": "no such model"}}
            )
            return
        assert call.path == "/tokenize"
        self.num_questions += 1
        fields = call.fields
        if "messages" in fields:
            tokens = [0] * self.num_template_tokens + self.tokens(fields["messages"][0]["content"])
        else:
            tokens = [1] * fields.get("add_special_tokens", True) + self.tokens(fields["prompt"])
        await call.json(200, {"count": len(tokens), "max_model_len": 2048, "tokens": tokens})

    def tokens(self, text: str) -> list[int]:
        return [5000 + COMMON_WORDS.index(word) for word in text.split() for _ in range(SPLIT.get(word, 1))]


def test_prompts_are_made_of_words_that_are_one_token_for_this_server() -> None:
    server = Server()
    target = ask(server)
    single = [word for word in COMMON_WORDS if word not in SPLIT]
    assert target.model == "smol"
    assert target.max_context == 2048
    assert list(target.vocabulary.words) == single
    assert set(target.vocabulary.ids) == {5000 + COMMON_WORDS.index(word) for word in single}
    assert server.num_questions < 50  # found by halving, not word by word


def test_a_model_that_the_server_does_not_know_is_refused_before_any_load() -> None:
    with pytest.raises(TransloadError, match=r'serves no model "smoll"; did you mean "smol".*it lists: smol, other'):
        ask(Server(), model="smoll")


def test_a_model_that_the_server_knows_but_does_not_list_is_taken() -> None:
    assert ask(Server(), model="alias").model == "alias"


def test_what_the_server_adds_to_a_text_is_measured() -> None:
    assert ask(Server(), endpoint="completions").vocabulary.num_overhead_tokens == 1
    assert ask(Server(), endpoint="chat").vocabulary.num_overhead_tokens == 11


def test_chat_is_asked_in_text_and_completions_in_ids_unless_told_otherwise() -> None:
    assert ask(Server()).prompt_kind == "ids"
    assert ask(Server(), prompt_kind="text").prompt_kind == "text"
    assert ask(Server(), endpoint="chat").prompt_kind == "text"


def test_a_named_model_and_named_ids_are_taken_as_they_are() -> None:
    target = ask(Server(), model="other", id_range=(7, 9))
    assert (target.model, target.vocabulary.ids) == ("other", (7, 8))


def test_a_server_that_cannot_be_asked_gets_ordinary_ids_and_words() -> None:
    async def bare(call: Call) -> None:
        await call.json(404, {"detail": "Not Found"})

    target = ask(bare, model="m")
    assert target.vocabulary.ids == tuple(range(*FALLBACK_IDS))
    assert target.vocabulary.words == COMMON_WORDS
    with pytest.raises(TransloadError, match="does not tell which models it serves; name one with --model"):
        ask(bare)


def test_a_tokenizer_that_splits_every_word_is_not_used() -> None:
    class Letters(Server):
        def tokens(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    assert ask(Letters()).vocabulary.ids == tuple(range(*FALLBACK_IDS))


def test_a_server_that_asks_for_a_key_says_so() -> None:
    async def locked(call: Call) -> None:
        await call.json(401, {"error": {"message": "no key"}})

    with pytest.raises(TransloadError, match=r"refuses us: no key \(HTTP 401\); give the key with --api-key"):
        ask(locked)


def test_a_server_of_another_kind_and_one_that_is_silent_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async def mail(call: Call) -> None:
        await call.raw(b"220 ESMTP\r\n\r\n")

    async def silent(call: Call) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr("transload.study.target.DISCOVERY_SECONDS", 0.2)
    with pytest.raises(TransloadError, match="does not speak HTTP"):
        ask(mail)
    with pytest.raises(TransloadError, match="took the connection but did not answer"):
        ask(silent)
