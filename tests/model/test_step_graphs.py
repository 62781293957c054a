"""The shapes that decode steps on a GPU are brought to, so that few graphs serve all of them. On any machine."""

from __future__ import annotations

import torch

from tests.model.stepping import stepper_of
from tests.model.test_llama import oracle_of, prompt_of
from transload.model.attention import GPU_PADDING, _rounded_up
from transload.model.step_graphs import StepGraphs, batch_size, batch_sizes


def test_batches_come_in_few_sizes_none_more_than_a_third_too_large() -> None:
    assert batch_sizes(64) == [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for num_rows in range(1, 300):
        assert num_rows <= batch_size(num_rows) <= max(num_rows + 1, num_rows * 3 // 2)


def test_contexts_come_in_few_lengths() -> None:
    lengths = {_rounded_up(num_blocks, 16, GPU_PADDING) * 16 for num_blocks in range(1, 513)}
    assert len(lengths) < 20
    for num_blocks in range(1, 513):
        assert num_blocks <= _rounded_up(num_blocks, 16, GPU_PADDING) <= max(16, num_blocks * 3 // 2)


def test_a_padded_batch_gives_its_own_rows_the_same_logits() -> None:
    made = stepper_of(oracle_of("smollm2"))
    running = [made.add(prompt_of(length)) for length in (9, 40, 21, 33, 17)]
    for request in running:
        made.prefill(request)
    chunks = tuple(made.chunk(request, 1) for request in running)
    padded = StepGraphs.padded(chunks)
    assert len(padded) == 6
    assert padded[:5] == chunks
    builder, attention = made.executor._batches, made.executor._model.attention
    with torch.inference_mode():
        own, more = (
            attention.logits(made.executor._run_layers(1, [attention.run(builder.build(each, step=1))], None)[0])
            for each in (chunks, padded)
        )
    torch.testing.assert_close(more[:5], own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(more[5], own[4], atol=1e-4, rtol=1e-4)
