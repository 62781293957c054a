"""`TorchExecutor`: memory it is given, layers it reports, rows it leaves out; and the dtype a device gets."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from tests.model.stepping import GREEDY, Running, Stepper, arch_of, stepper_of, tensors_of
from tests.model.test_llama import oracle_of, prompt_of
from transload.control.messages import RunStep, Sampling
from transload.model import precision
from transload.model.build import build_model
from transload.model.executor import TorchExecutor
from transload.model.precision import default_dtype


def stepper() -> Stepper:
    return stepper_of(oracle_of("smollm2"))


def reported(
    stepper: Stepper, *, streams: bool, running: Running, num_tokens: int | None = None
) -> list[tuple[int, int]]:
    frames: list[tuple[int, int]] = []
    chunk = stepper.chunk(running, num_tokens, streams=streams)
    stepper.executor.run_step(RunStep(step=1, chunks=(chunk,)), lambda low, high: frames.append((low, high)))
    return frames


def with_frames_of(layers_per_frame: int) -> Stepper:
    made = stepper()
    made.executor._layers_per_frame = layers_per_frame
    return made


@pytest.mark.parametrize(
    ("layers_per_frame", "frames"),
    [(1, [(0, 1), (1, 2), (2, 3), (3, 4)]), (3, [(0, 3), (3, 4)]), (4, [(0, 4)]), (9, [(0, 4)])],
)
def test_a_streaming_step_reports_every_layer_once_and_in_order(
    layers_per_frame: int, frames: list[tuple[int, int]]
) -> None:
    made = with_frames_of(layers_per_frame)
    assert reported(made, streams=True, running=made.add(prompt_of(20))) == frames


def test_a_streaming_chunk_that_draws_no_token_reports_every_layer() -> None:
    made = with_frames_of(3)
    assert reported(made, streams=True, running=made.add(prompt_of(20)), num_tokens=7) == [(0, 3), (3, 4)]


def test_a_step_that_streams_nothing_reports_nothing() -> None:
    made = with_frames_of(1)
    assert reported(made, streams=False, running=made.add(prompt_of(20))) == []


def test_reported_layers_are_in_the_cache_already() -> None:
    made = with_frames_of(1)
    running = made.add(prompt_of(20))
    seen: list[torch.Tensor] = []

    def look(low: int, high: int) -> None:
        assert high == low + 1
        seen.append(made.executor.cache.tensor[running.blocks[1], low, :, :, :4].clone())

    made.executor.run_step(RunStep(step=1, chunks=(made.chunk(running, streams=True),)), look)
    for layer, cells in enumerate(seen):
        assert torch.equal(cells, made.executor.cache.tensor[running.blocks[1], layer, :, :, :4])
        assert bool((cells != 0).all())


def test_the_cache_lies_in_the_memory_it_was_given() -> None:
    oracle = oracle_of("smollm2")
    arch = arch_of(oracle)
    own = stepper_of(oracle)
    with mmap.mmap(-1, own.executor.layout.block_bytes * 160) as memory:
        model = build_model(arch, tensors_of(oracle, arch), torch.float32, False, torch.device("cpu"))
        mapped = stepper_of(oracle)
        mapped.executor = TorchExecutor(model, own.executor.layout, 160, buffer=memory)
        first, second = own.add(prompt_of(40)), mapped.add(prompt_of(40))
        own.prefill(first)
        mapped.prefill(second)
        assert first.tokens == second.tokens
        start = first.blocks[0] * own.executor.layout.block_bytes
        want = own.executor.cache.tensor[first.blocks[0]].flatten().view(torch.uint8).numpy().tobytes()
        assert memory[start : start + own.executor.layout.block_bytes] == want
        del mapped, model  # the mapping cannot be closed while tensors look into it


def test_a_cache_copied_block_by_block_goes_on_with_the_same_tokens() -> None:
    """A handoff: whole blocks as bytes, into other blocks of another worker that held other requests before."""
    oracle = oracle_of("llama-llama3")
    source, target = stepper_of(oracle), stepper_of(oracle, seed=5)
    target.executor.cache.tensor.fill_(float("nan"))
    alone = source.add(prompt_of(53))
    source.prefill(alone)
    moved = target.add(prompt_of(53))
    for here, there in zip(alone.blocks[:4], moved.blocks[:4], strict=True):
        target.executor.cache.tensor[there] = source.executor.cache.tensor[here]
    moved.tokens, moved.num_computed = list(alone.tokens), alone.num_computed
    for _ in range(20):
        source.step((alone, 1))
        target.step((moved, 1))
    assert moved.tokens == alone.tokens


def test_what_a_block_held_before_never_reaches_a_new_request() -> None:
    oracle = oracle_of("mistral")
    clean, dirty = stepper_of(oracle), stepper_of(oracle)
    dirty.executor.cache.tensor.fill_(float("nan"))
    for length in (1, 15, 16, 17, 60):
        first, second = clean.add(prompt_of(length)), dirty.add(prompt_of(length))
        assert clean.generate(first, 40, chunk_tokens=13) == dirty.generate(second, 40, chunk_tokens=13)


def test_tokens_come_in_the_order_of_the_chunks_and_only_where_asked_for() -> None:
    made = stepper()
    work = [made.add(prompt_of(length)) for length in (9, 40, 1, 25)]
    done = made.step((work[0], None), (work[1], 30), (work[2], None), (work[3], None))
    assert [sampled.request for sampled in done.sampled] == [work[0].request.id, work[2].request.id, work[3].request.id]
    assert done.step == 1
    assert done.seconds > 0


def test_an_empty_step_is_done_at_once() -> None:
    assert stepper().run(()).sampled == ()


def test_a_failed_step_leaves_other_requests_alone() -> None:
    made = stepper()
    good, bad = made.add(prompt_of(30)), made.add([1, 2, 99_999])
    made.prefill(good)
    with pytest.raises(IndexError):
        made.step((good, 1), (bad, None))
    made.generate(good, 10)
    again = made.add(prompt_of(30))
    assert made.generate(again, 10) == good.outputs


def test_a_seeded_text_is_the_same_alone_and_in_a_batch() -> None:
    oracle = oracle_of("smollm2")
    sampling = Sampling(temperature=1.0, seed=77, top_p=0.95, repetition_penalty=1.1)
    alone = stepper_of(oracle)
    want = alone.generate(alone.add(prompt_of(30), sampling), 30)
    made = stepper_of(oracle, seed=3)
    running = made.add(prompt_of(30), sampling)
    others = [made.add(prompt_of(length), s) for length, s in ((10, Sampling(seed=5)), (70, GREEDY))]
    made.step((others[0], None), (running, 12), (others[1], None))
    made.step((running, None), (others[1], 1))
    while running.num_outputs < 30:
        made.step((others[0], 1), (running, 1), (others[1], 1))
    assert running.outputs == want


@pytest.mark.parametrize(
    ("cpuinfo", "want"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sha\n", "bfloat16"),
        ("flags : amx_bf16 amx_tile\n", "bfloat16"),
        ("Features\t: fp asimd bf16 i8mm\n", "bfloat16"),
        ("flags\t\t: fpu avx512f avx2\n", "float32"),
        ("", "float32"),
    ],
)
def test_a_cpu_gets_bfloat16_if_it_multiplies_it(
    cpuinfo: str, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    monkeypatch.setattr(precision, "Path", lambda _: path)
    assert default_dtype("cpu") == want


def test_a_machine_without_cpuinfo_gets_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "Path", lambda _: tmp_path / "missing")
    assert default_dtype("cpu") == "float32"
