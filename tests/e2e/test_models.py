"""A checkpoint of the user's own, through the real server and the real split, against `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.live import LiveServer
from tests.model.tiny_models import saved, tiny_model
from tests.model.tiny_tokenizers import byte_level, saved_tokenizer

pytestmark = pytest.mark.slow
PROMPT = [5, 17, 30, 8, 99, 41, 3, 77, 12, 60, 28, 90, 55, 14, 71, 33, 47, 9, 64]


@pytest.mark.parametrize("name", ["qwen3", "mistral", "qwen3_moe", "mixtral", "gpt_oss"])
def test_a_folder_of_safetensors_is_served_as_transformers_computes_it(name: str, tmp_path: Path) -> None:
    oracle = tiny_model(name).float().eval()
    folder = saved(oracle, tmp_path / name)
    saved_tokenizer(byte_level(), folder)
    with torch.inference_mode():
        expected = oracle.generate(
            torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(PROMPT) :].tolist()
    with LiveServer("--model", str(folder), "--dtype", "float32", "--set", "router.local_prefill=fallback") as server:
        answer = server.client.completions.create(
            model="default",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == [f"token_id:{token}" for token in expected]
        stages = server.get(f"/requests/{answer.id}")["choices"][0]["stages"]
        assert {"prefill-0", "decode-0"} <= {stage["worker"] for stage in stages}
